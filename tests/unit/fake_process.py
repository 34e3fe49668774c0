"""A stand-in for one SGLang server's process, started by Servers(command="fake_process"): `PARENT_PID [flags]`.

$FAKE_DIR/plan says what its starts do, comma-separated, the last for all that follow: serve, exit, taken (its port),
loading (listens, never healthy). $FAKE_DIR/hang: it stops answering while the file is there. Each start adds a line to
$FAKE_DIR/starts: its pid, its child's pid, and its arguments.
"""

import http.server
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from offtrail.platform.engines.sglang.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE, die_with

die_with(int(sys.argv[1]))
FOLDER = Path(os.environ["FAKE_DIR"])
KEYS = {"/model_info": os.environ[KEY_VARIABLE], "/abort_request": os.environ[ADMIN_KEY_VARIABLE]}
KEYS["/server_info"] = KEYS["/health_generate"] = KEYS["/v1/completions"] = KEYS["/model_info"]
CHILD = "import sys; sys.path[:0] = sys.argv[2:]; from offtrail.platform.engines.sglang.serve import die_with; "
CHILD += "die_with(int(sys.argv[1])); import time; time.sleep(600)"


def plan() -> str:
    starts, steps = FOLDER / "starts", (FOLDER / "plan").read_text().strip().split(",")
    before = len(starts.read_text().splitlines()) if starts.exists() else 0
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(os.getpid()), *sys.path])
    with starts.open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "child": child.pid, "arguments": sys.argv[2:]}) + "\n")
    return steps[min(before, len(steps) - 1)]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        while (FOLDER / "hang").exists():
            time.sleep(0.01)
        key = KEYS.get(self.path, "")
        if self.path.startswith("/health") and STEP == "loading":
            self.answer(503, None)
        elif key and self.headers.get("Authorization") != f"Bearer {key}":
            self.answer(401, None)
        else:
            version = os.environ.get("FAKE_VERSION", "0.5.21")
            self.answer(200, {"version": version} if version and self.path == "/server_info" else {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


STEP = plan()
if STEP == "exit":
    print("RuntimeError: no weights here\nbye", flush=True)
    sys.exit(3)
if STEP == "taken":
    print("[Errno 98] error while attempting to bind on address: address already in use", flush=True)
    sys.exit(1)
PORT = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
