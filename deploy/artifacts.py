"""Save, restore, count or delete the files of runs and models, in the folder or in the bucket of ARTIFACTS_DESTINATION.

Usage: python artifacts.py save > FILE
       python artifacts.py restore < FILE
       python artifacts.py size
       python artifacts.py delete

FILE is a tar, and the same for a folder and for a bucket: a team moves from one to the other by saving and restoring.
"""

import contextlib
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit


class Folder:
    """Files in a folder."""

    def __init__(self, path: Path):
        """Take a folder that is there."""
        self.path = path

    def list(self) -> Iterator[tuple[str, int]]:
        """Give the name and the size in bytes of each file."""
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                yield path.relative_to(self.path).as_posix(), path.stat().st_size

    def open(self, name: str) -> IO[bytes]:
        """Return the content of a file."""
        return (self.path / name).open("rb")

    def write(self, name: str, content: IO[bytes]) -> None:
        """Write a file, whole or not at all."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            shutil.copyfileobj(content, file)
        partial.replace(path)

    def delete(self, name: str) -> None:
        """Delete a file, and the folders that are empty then."""
        path = self.path / name
        path.unlink()
        for folder in path.parents:
            if folder == self.path or any(folder.iterdir()):
                break
            folder.rmdir()


class Bucket:
    """Files in a bucket of an S3 store, below a prefix."""

    def __init__(self, name: str, prefix: str):
        """Reach the store by boto3's own settings, and MLFLOW_S3_ENDPOINT_URL."""
        import boto3

        self.name, self.prefix = name, f"{prefix}/" if prefix else ""
        self.client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None)

    def list(self) -> Iterator[tuple[str, int]]:
        """Give the name and the size in bytes of each file."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix)
        with contextlib.suppress(self.client.exceptions.NoSuchBucket):  # the store makes it with the first file
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):
                        yield item["Key"].removeprefix(self.prefix), item["Size"]

    def open(self, name: str) -> IO[bytes]:
        """Return the content of a file."""
        return self.client.get_object(Bucket=self.name, Key=self.prefix + name)["Body"]

    def write(self, name: str, content: IO[bytes]) -> None:
        """Write a file, whole or not at all; a large one in parts."""
        with tempfile.TemporaryFile() as file:  # boto3 goes back in it, which a stream cannot
            shutil.copyfileobj(content, file)
            file.seek(0)
            self.client.upload_fileobj(file, self.name, self.prefix + name)

    def delete(self, name: str) -> None:
        """Delete a file."""
        self.client.delete_object(Bucket=self.name, Key=self.prefix + name)


def open_store(destination: str) -> Folder | Bucket:
    """Return the files at a destination, such as /artifacts or s3://bucket/prefix."""
    parts = urlsplit(destination)
    if parts.scheme == "s3":
        return Bucket(parts.netloc, parts.path.strip("/"))
    return Folder(Path(parts.path))


def save(store: Folder | Bucket, target: IO[bytes]) -> None:
    """Write all files to a tar. A file that is deleted meanwhile is left out."""
    with tarfile.open(fileobj=target, mode="w|") as archive:
        for name, size in store.list():
            member = tarfile.TarInfo(name)
            member.size = size
            with contextlib.suppress(FileNotFoundError), open_listed(store, name) as content:
                archive.addfile(member, content)


def open_listed(store: Folder | Bucket, name: str) -> IO[bytes]:
    """Return the content of a file that was listed.

    Raises:
        FileNotFoundError: it was deleted since then.
    """
    try:
        return contextlib.closing(store.open(name))
    except Exception as error:
        if getattr(error, "response", {}).get("Error", {}).get("Code") == "NoSuchKey":
            raise FileNotFoundError(name) from None
        raise


def restore(store: Folder | Bucket, source: IO[bytes]) -> None:
    """Write all files of a tar.

    Raises:
        ValueError: a name in it leads out of the store.
    """
    with tarfile.open(fileobj=source, mode="r|") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{member.name!r} leads out of the store. Nothing more was restored.")
            if member.isfile():
                store.write(str(name), archive.extractfile(member))


def main(action: str) -> None:
    """Do what the user asks for."""
    store = open_store(os.environ["ARTIFACTS_DESTINATION"])
    if action == "save":
        save(store, sys.stdout.buffer)
    elif action == "restore":
        restore(store, sys.stdin.buffer)
    elif action == "size":
        sizes = [size for _, size in store.list()]
        print(f"{len(sizes)} files, {sum(sizes):,} bytes")
    elif action == "delete":
        for name, _ in list(store.list()):
            store.delete(name)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
