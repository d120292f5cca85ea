"""Create a bucket if it is missing, and wait for the S3 server.

python docker/make_bucket.py NAME

Endpoint and keys come from the usual AWS_* variables.
"""

from __future__ import annotations

import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def make_bucket(name: str, seconds: float = 120) -> None:
    """Create a bucket if it is missing.

    Args:
        name: The bucket's name.
        seconds: For how long a server that does not answer is asked again.

    Raises:
        BotoCoreError: The server did not answer within that time.
        ClientError: It refused within that time.
    """
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
