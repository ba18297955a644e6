"""A local object store with the interface of S3, which fails on request."""

import itertools
import threading
from contextlib import contextmanager

from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class _Quiet(WSGIRequestHandler):
    def log_request(self, code="-", size="-"):
        pass


class Server:
    """Serves one in-memory store; `requests` lists what came in, `fail` decides which requests get an error."""

    def __init__(self):
        self.requests: list[tuple[str, str]] = []
        self.fail = lambda number, method, path: None
        """Returns a status line, or None; "drop" does the work and then loses the answer."""
        self._numbers = itertools.count()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _serve(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        number = next(self._numbers)
        self.requests.append((method, path))
        status = self.fail(number, method, path)
        if status == "drop":
            b"".join(self._app(environ, lambda *_: None))
            status = "503 Service Unavailable"
        elif status is None:
            return self._app(environ, start_response)
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = b"<Error><Code>InternalError</Code><Message>asked for</Message></Error>"
        body = b"" if method == "HEAD" else body
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def object_store(monkeypatch):
    """A running server with a bucket `shelf`, and this process's fsspec pointed at it."""
    import fsspec
    import s3fs

    s3_backends.reset()  # of the whole process
    server = Server()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url})
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        fsspec.filesystem("s3").mkdir("shelf")
        yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.close()
