"""Real servers on loopback: one that speaks S3 (moto) and one that speaks GCS."""

import importlib.util
import logging
import os
import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from gnvc_jax import buckets

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]

NEEDED = {
    "s3": ("s3fs", "moto", "flask", "flask_cors"),
    "gs": ("gcsfs", "gcp_storage_emulator"),
}


@pytest.fixture(scope="session")
def free_port():
    """Function that finds a port that nothing listens on."""

    def find() -> int:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def s3_server(free_port):
    """Address of an S3 server with an empty bucket `tests`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(
        urllib.request.Request(f"http://{host}:{port}/tests", method="PUT")
    ).close()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def gs_server(free_port):
    """Address of a GCS server with an empty bucket `tests`."""
    from gcs_server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # each missing object
    port = free_port()
    server = create_server(port)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(request, tmp_path, monkeypatch):
    """URL of a new folder in a bucket; what this and other processes copy is kept in tmp_path."""
    scheme = request.param
    for package in NEEDED[scheme]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the server needs {package}; pip install 'gnvc-jax[test-buckets]'")
    import fsspec

    server = request.getfixturevalue(f"{scheme}_server")
    environment = {
        "s3": {
            "AWS_ENDPOINT_URL": server,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        "gs": {
            "STORAGE_EMULATOR_HOST": server,
            "TENSORSTORE_GCS_HTTP_URL": server,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google for the kind of bucket
        },
    }[scheme]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Copies stay, however full the disk of this machine is.
    monkeypatch.setattr(buckets, "FREE_SHARE", 0.0)
    yield f"{scheme}://tests/{tmp_path.name}"
    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    assert not [p for p in Path(os.getcwd()).iterdir() if p.name.startswith(f"{scheme}:")]
