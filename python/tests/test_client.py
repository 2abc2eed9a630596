"""The client against a server of this process."""

import contextlib
import http.client
import http.server
import json
import socket
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
        if self.path.startswith("/v2/models/hangs-up"):
            return self.hang_up(b"")
        if self.path.startswith("/v2/models/ends-early"):
            return self.hang_up(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        if self.path.startswith("/v2/models/slow"):
            self.server.is_over.wait()
            return self.hang_up(b"")
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

    def hang_up(self, begun):
        self.server.hung_up += 1
        self.wfile.write(begun)
        self.close_connection = True

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Listens in a thread until it is stopped, and hangs up on everyone then, as a process that ends does."""

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Doubling)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.hung_up = 0
        self.is_over = threading.Event()
        self.connections = []
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.shutdown()
        self.thread.join()
        for connection in self.connections:
            # The thread that serves it may have closed it.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def url(server):
    return server.url


def doubles(client, count=1):
    values = numpy.arange(count, dtype=numpy.float32)
    return numpy.array_equal(client.infer("binary", {"input": values}).outputs["doubled"], values * 2)


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


# What is sent to a connection that is closed is noticed when the answer is read, and of much of it when it is sent.
@pytest.mark.parametrize("count", [1, 4 << 20])
def test_a_server_that_was_started_again_is_found(count):
    with Server() as server:
        client = Client(server.url)
        assert doubles(client)
    with Server(server.server_port), client:
        assert doubles(client, count) and doubles(client)


def test_a_server_that_is_away_is_found_when_it_is_back():
    with Server() as server:
        client = Client(server.url)
        assert doubles(client)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            doubles(client)
    assert not client.is_ready()
    with Server(server.server_port), client:
        assert doubles(client) and client.is_ready()


@pytest.mark.parametrize(
    "model, times, error",
    [
        # Once over the connection that was kept, once over a new one.
        ("hangs-up", 2, http.client.RemoteDisconnected),
        # An answer had begun.
        ("ends-early", 1, http.client.IncompleteRead),
    ],
)
def test_a_request_that_fails_leaves_a_client_that_works(server, model, times, error):
    values = {"input": numpy.zeros(1, numpy.float32)}
    with Client(server.url) as client:
        assert doubles(client)
        with pytest.raises(error):
            client.infer(model, values)
        assert server.hung_up == times
        # Over a new connection none is sent again.
        with pytest.raises(error):
            client.infer(model, values)
        assert server.hung_up == times + 1
        assert doubles(client)


def test_a_request_that_took_too_long_leaves_a_client_that_works(server):
    with Client(server.url, timeout_s=0.5) as client:
        with pytest.raises(TimeoutError):
            client.infer("slow", {"input": numpy.zeros(1, numpy.float32)})
        assert doubles(client)
