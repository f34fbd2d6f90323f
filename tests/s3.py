"""A real S3 server for tests: moto's, in a process of its own, spoken to over HTTP."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from uuid import uuid4

from tests.canaries import STORE

S3_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": STORE, "AWS_REGION": "us-east-1"}


class S3Server:
    """A server of the test session."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, "the S3 server ended at once"
            assert time.monotonic() < give_up, "the S3 server does not answer"
            time.sleep(0.1)

    def create_bucket(self) -> str:
        """Create a bucket and return the URL of a store in it."""
        bucket = f"test-{uuid4().hex}"
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{bucket}", method="PUT"), timeout=10).close()
        return f"s3://{bucket}/pare?endpoint={self.url}&region=us-east-1"

    def stop(self) -> None:
        """Stop the server."""
        self._process.terminate()
        self._process.wait(30)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            return False
        return True
