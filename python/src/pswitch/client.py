"""A small client of the Open Inference Protocol v2 over HTTP, with the binary tensor extension."""

import dataclasses
import http.client
import json
import urllib.parse

import numpy

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    # numpy has no bfloat16: its 16 bits come as they are.
    "BF16": "uint16",
}


class ServerError(Exception):
    """The server answered with an error; `status` is the HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(f"{message} (HTTP {status})")
        self.status = status


@dataclasses.dataclass(frozen=True)
class Answer:
    """Outputs by name, and what the server said about the request (`queue_us`, `switch_us`, `compute_us` ...)."""

    outputs: dict[str, numpy.ndarray]
    parameters: dict


class Client:
    """A connection to a server, opened when it is needed.

    `Client("http://127.0.0.1:8000").infer("resnet152", {"x": picture})`

    A request that fails closes it. When the server had closed it since the last request, as one does that is started
    again, the request goes out once more, over a new one.
    """

    def __init__(self, url: str, timeout_s: float = 120.0):
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"'{url}' is no http://HOST:PORT")
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()

    def is_ready(self) -> bool:
        """Whether the server says that it takes requests; False too if there is no server."""
        try:
            self._request("GET", "/v2/health/ready")
        except (OSError, http.client.HTTPException, ServerError):
            return False
        return True

    def models(self) -> list[dict]:
        """Name and state of every model of the repository."""
        return json.loads(self._request("POST", "/v2/repository/index", b"{}")[1])

    def metadata(self, model: str) -> dict:
        """Inputs and outputs of a model: names, datatypes and shapes."""
        return json.loads(self._request("GET", f"/v2/models/{urllib.parse.quote(model)}")[1])

    def infer(self, model: str, inputs: dict[str, numpy.ndarray]) -> Answer:
        """Sends the inputs as bytes and returns all outputs."""
        names = {numpy.dtype(name): datatype for datatype, name in DATATYPES.items() if datatype != "BF16"}
        arrays = {name: numpy.ascontiguousarray(value) for name, value in inputs.items()}
        header = {
            "inputs": [
                {
                    "name": name,
                    "shape": list(inputs[name].shape),
                    "datatype": names[array.dtype],
                    "parameters": {"binary_data_size": array.nbytes},
                }
                for name, array in arrays.items()
            ],
            "parameters": {"binary_data_output": True},
        }
        head = json.dumps(header).encode()
        body = b"".join([head, *(array.tobytes() for array in arrays.values())])
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        path = f"/v2/models/{urllib.parse.quote(model)}/infer"
        response_headers, content = self._request("POST", path, body, headers)
        return _answer(response_headers.get("Inference-Header-Content-Length"), content)

    def _request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
        try:
            response = self._response(method, path, body, headers or {})
            content = response.read()
        except BaseException:
            # An answer that was not read to its end would be taken for that of the next request.
            self._connection.close()
            raise
        if response.status != 200:
            try:
                message = json.loads(content)["error"]
            except (ValueError, KeyError, TypeError):
                message = content.decode(errors="replace") or response.reason
            raise ServerError(response.status, message)
        return response.headers, content

    def _response(self, method: str, path: str, body: bytes | None, headers: dict) -> http.client.HTTPResponse:
        is_kept = self._connection.sock is not None
        try:
            self._connection.request(method, path, body, headers)
            return self._connection.getresponse()
        except (BrokenPipeError, ConnectionResetError):  # the latter is `http.client.RemoteDisconnected` too
            if not is_kept:
                raise
        # No request changes anything, so none does harm if the first one came through.
        self._connection.close()
        self._connection.request(method, path, body, headers)
        return self._connection.getresponse()


def _answer(header_length: str | None, content: bytes) -> Answer:
    end = len(content) if header_length is None else int(header_length)
    header = json.loads(content[:end])
    outputs = {}
    for output in header["outputs"]:
        dtype = numpy.dtype(DATATYPES[output["datatype"]])
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = numpy.array(output["data"], dtype=dtype)
        else:
            values = numpy.frombuffer(content[end : end + size], dtype=dtype)
            end += size
        outputs[output["name"]] = values.reshape(output["shape"])
    return Answer(outputs, header.get("parameters", {}))
