"""Make a bucket where it is missing, waiting for the S3 server: python docker/make_bucket.py NAME

Endpoint and keys come from the usual AWS_* variables.
"""

from __future__ import annotations

import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def make_bucket(name: str, seconds: float = 120) -> None:
    """Raises what the server answered last when it does not within the time."""
    end = time.monotonic() + seconds
    while True:
        try:
            client = boto3.client("s3")
            if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=name)
            return
        except (BotoCoreError, ClientError):
            if time.monotonic() > end:
                raise
            time.sleep(2)


if __name__ == "__main__":
    make_bucket(sys.argv[1])
