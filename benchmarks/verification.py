"""Measure what it costs to verify a version's signature, beside the bare SHA-256 of the same bytes.

Usage: python benchmarks/verification.py [--megabytes 1 100 1000] [--rounds 5]

The folder holds one file of random bytes of that size, beside what a version has. It is signed once, by the key and the
settings of `mlflow_lifecycle.signing.statement`. Verifying reads every byte once and checks one signature; the peer is
`hashlib.file_digest` of the large file. A round runs both, in turn; a ratio is formed within a round, and its median
over the rounds is the figure, with the range. What a download takes is not in it.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import model_signing

from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.statement import every_file


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[1, 100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    print("    MB   verified (s)   SHA-256 (s)   verified / SHA-256")
    with tempfile.TemporaryDirectory() as place:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}/mlflow.db"
        key, public_key = own_key(), own_public_key()
        for size in settings.megabytes:
            root, signature = Path(place) / f"{size}", Path(place) / f"{size}.sig"
            root.mkdir()
            with (root / "model.skops").open("wb") as file:
                for _ in range(size):
                    file.write(os.urandom(10**6))
            (root / "statement.json").write_text("{}")
            signer = model_signing.signing.Config().set_hashing_config(every_file())
            signer.use_elliptic_key_signer(private_key=key).sign(root, signature)
            taken = {"verified": [], "bare": []}
            for _ in range(settings.rounds + 1):
                begin = time.perf_counter()
                verifier = model_signing.verifying.Config().set_hashing_config(every_file())
                verifier.use_elliptic_key_verifier(public_key=public_key).verify(root, signature)
                taken["verified"].append(time.perf_counter() - begin)
                begin = time.perf_counter()
                with (root / "model.skops").open("rb") as file:
                    hashlib.file_digest(file, "sha256")
                taken["bare"].append(time.perf_counter() - begin)
            ours, bare = taken["verified"][1:], taken["bare"][1:]  # the first round fills the file cache
            ratios = [one / other for one, other in zip(ours, bare, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{size:6}{statistics.median(ours):15.3f}{statistics.median(bare):14.3f}   {spread}")
            (root / "model.skops").unlink()


if __name__ == "__main__":
    main()
