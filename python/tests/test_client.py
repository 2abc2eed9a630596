"""The client against a server of this process."""

import http.server
import json
import threading

import numpy
import pytest

from pswitch.client import Client, ServerError


class Doubling(http.server.BaseHTTPRequestHandler):
    """Answers with twice the first input, in binary or JSON as its name asks."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, b"" if self.path == "/v2/health/ready" else json.dumps({"name": "double"}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/v2/models/broken"):
            return self.reply(404, json.dumps({"error": "there is no model 'broken'"}).encode())
        length = int(self.headers["Inference-Header-Content-Length"])
        request = json.loads(body[:length])
        (given,) = request["inputs"]
        assert given["parameters"]["binary_data_size"] == len(body) - length
        values = numpy.frombuffer(body[length:], dtype="<f4").reshape(given["shape"]) * 2
        output = {"name": "doubled", "datatype": "FP32", "shape": given["shape"]}
        answer = {"model_name": "double", "outputs": [output], "parameters": {"switch_us": 12.5}}
        if self.path.startswith("/v2/models/as-json"):
            output["data"] = values.ravel().tolist()
            return self.reply(200, json.dumps(answer).encode())
        output["parameters"] = {"binary_data_size": values.nbytes}
        head = json.dumps(answer).encode()
        return self.reply(200, head + values.tobytes(), {"Inference-Header-Content-Length": str(len(head))})

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Doubling)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("model", ["binary", "as-json"])
def test_tensors_go_and_come(url, model):
    values = numpy.arange(6, dtype=numpy.float32).reshape(2, 3).T
    with Client(url) as client:
        answer = client.infer(model, {"input": values})
    assert numpy.array_equal(answer.outputs["doubled"], values * 2)
    assert answer.parameters == {"switch_us": 12.5}


def test_errors_carry_the_servers_words(url):
    with Client(url) as client, pytest.raises(ServerError, match="there is no model 'broken'") as raised:
        client.infer("broken", {"input": numpy.zeros(1, numpy.float32)})
    assert raised.value.status == 404


def test_ready(url):
    with Client(url) as client:
        assert client.is_ready()
    assert not Client("http://127.0.0.1:9").is_ready()
    with pytest.raises(ValueError, match="no http://"):
        Client("https://localhost")
