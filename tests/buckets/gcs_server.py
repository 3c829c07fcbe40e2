"""The GCS emulator of PyPI, completed by what TensorStore needs of the real one.

That is the generation of an object in the header of its contents, and requests that are conditional
on a generation: `ifGenerationMatch` for writing, `ifGenerationNotMatch` for reading.
"""

from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket: str, name: str) -> str:
    """Generation of an object, "0" if it is not there."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def complete(handler):
    """Gives a handler of objects the conditions and the header."""

    def completed(request, response, storage, *args, **kwargs):
        query = {key: values[0] for key, values in request.query.items()}
        name = request.params.get("object_id") or query.get("name")
        found = generation(storage, request.params["bucket_name"], name) if name else "0"
        if query.get("ifGenerationMatch", found) != found:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        if "ifGenerationNotMatch" in query and query["ifGenerationNotMatch"] == found != "0":
            response.status = HTTPStatus.NOT_MODIFIED
            return
        if found != "0":
            response["x-goog-generation"] = found
        handler(request, response, storage, *args, **kwargs)

    return completed


def create_server(port: int):
    """A server on loopback with an empty bucket `tests` in memory."""
    of_objects = (objects.get, objects.download, objects.insert)
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            if handler in of_objects:
                handlers[method] = complete(handler)
    return server.create_server("127.0.0.1", port, in_memory=True, default_bucket="tests")
