"""The S3 store of deploy/compose.yaml, run on this machine without a container."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
from deployment import services
from execution import free_port, running

BUCKET = "mlflow"
SECRET = "9Xw2-kT5_bN8-rQ1_vM4-zH7_jL0-pF3_sC"
PARTS = ("master", "volume", "filer")  # of the store; each has a port, and one for gRPC


def program() -> str | None:
    """Return the path of the store's program, or None where it is not installed."""
    return shutil.which("weed", path=str(Path(sys.executable).parent))


class ObjectStore:
    """An S3 store with its files in ``folder``.

    Attributes:
        settings: what .env says, so that the server uses it.
    """

    def __init__(self, folder: Path):
        """Choose the ports; start nothing."""
        self.folder = folder
        (folder / "objects").mkdir(parents=True)
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.settings = {
            "ARTIFACTS_DESTINATION": f"s3://{BUCKET}",
            "MLFLOW_S3_ENDPOINT_URL": self.address,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        service = services(self.settings)["store"]
        places = {"weed": program(), "-dir=/objects": f"-dir={folder / 'objects'}"}
        places |= {"-s3.ip.bind=0.0.0.0": "-s3.ip.bind=127.0.0.1", "-s3.port=8333": f"-s3.port={self.port}"}
        self.command = [places.get(part, part) for part in service["command"]]
        self.command += [f"-s3.port.grpc={free_port()}"]
        self.command += [f"-{part}.port{kind}={free_port()}" for part in PARTS for kind in ("", ".grpc")]
        self.variables = {
            "HOME": str(folder),
            "PATH": os.environ["PATH"],
            "AWS_ACCESS_KEY_ID": service["environment"]["AWS_ACCESS_KEY_ID"],
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        self.life = contextlib.ExitStack()

    def start(self) -> None:
        """Start the store and wait until it answers."""
        log = self.folder / f"store{len(list(self.folder.glob('store*.log')))}.log"
        store = running(self.command, f"{self.address}/healthz", log, cwd=self.folder, env=self.variables)
        self.life.enter_context(store)

    def kill(self) -> None:
        """Kill the store by SIGKILL, as `docker compose stop` does."""
        self.life.close()

    def client(self):
        """Return boto3's client of the store."""
        return boto3.client(
            "s3",
            endpoint_url=self.address,
            aws_access_key_id=self.variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def files(self) -> dict[str, str]:
        """Return the ETag of each file in the bucket, by name."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", [])}


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Run the store until the end of the block."""
    store = ObjectStore(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(store.kill)
        store.start()
        yield store
