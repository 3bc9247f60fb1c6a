"""An OpenAI-compatible server that misbehaves by a script: one word per request, then it answers well."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer_to(prompt):
    return f"answer to {prompt}"


class FakeServer:
    def __init__(self, script=(), port=0):
        self.script = list(script)
        self.requests = []  # (path, body)
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with fake._lock:
                    fake.requests.append((self.path, body))
                    act = fake.script.pop(0) if fake.script else "good"
                fake.play(self, act, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def play(self, handler, act, body):
        text = answer_to(body["messages"][0]["content"] if "messages" in body else body["prompt"])
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        reply = {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
        good = json.dumps(reply).encode()

        def send(content, status=200, length=None, **headers):
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("content-length", str(len(content) if length is None else length))
            handler.end_headers()
            handler.wfile.write(content)

        if act == "good":
            send(good)
        elif act.isdigit():
            send(b"overloaded", int(act), retry_after="7")
        elif act.startswith("503 "):
            send(b"overloaded", 503, retry_after=act[4:])
        elif act == "nested":
            send(b"[" * 100_000)
        elif act == "half":  # the last emoji was cut, as JSON may spell it
            send(good.replace(b'"}', b'\\ud83d"}', 1))
        elif act == "garbage":
            send(b"<html>It works!</html>")
        elif act == "binary":
            send(bytes(range(256)))
        elif act == "zip":
            send(b"no gzip at all", content_encoding="gzip")
        elif act == "empty":
            send(b"{}")
        elif act == "list":
            send(b"[1, 2]")
        elif act == "null":
            choice["message"] = {"content": None}
            choice["text"] = None
            send(json.dumps(reply).encode())
        elif act == "aborted":
            choice["finish_reason"] = "abort"
            send(json.dumps(reply).encode())
        elif act == "cut":  # the connection ends in the middle of the answer
            send(good[: len(good) // 2], length=len(good))
        elif act == "short":  # the answer is cut, its length is not
            send(good[: len(good) // 2])
        elif act == "hang up":
            handler.close_connection = True
        elif act == "slow":
            time.sleep(1.0)
            send(good)
        elif act == "drip":
            handler.send_response(200)
            handler.send_header("content-length", str(len(good)))
            handler.end_headers()
            try:
                for i in range(len(good)):
                    handler.wfile.write(good[i : i + 1])
                    handler.wfile.flush()
                    time.sleep(0.05)
            except OSError:
                pass  # the client has had enough
        else:
            raise AssertionError(act)
