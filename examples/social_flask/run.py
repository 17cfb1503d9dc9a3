"""The whole example by one command: ``python examples/social_flask/run.py [--port 8000]``.

Web server, the two services and the outbox's relay, each a process of its own, on SQLite and on the broker that the
settings name (the embedded one if none is). Ctrl-C ends all of them. ``--state DIR`` says where the database is.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--state", type=Path, default=HERE, help="directory of the database files")
    options = parser.parse_args()
    state = options.state.resolve()
    os.environ["SOCIAL_STATE"] = str(state)
    os.environ.setdefault("PUBSUB_SQLITE__PATH", str(state / "pubsub.db"))
    flask = [sys.executable, "-m", "flask", "--app", str(HERE / "app.py")]
    subprocess.run([*flask, "create-tables"], check=True)
    serve = ["run", "--port", str(options.port)]
    parts = [
        subprocess.Popen([*flask, *command], start_new_session=True)
        for command in (serve, ["pubsub", "run"], ["relay"])
    ]
    print(f"open http://127.0.0.1:{options.port}/ and http://127.0.0.1:{options.port}/analytics/", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while all(part.poll() is None for part in parts):
            time.sleep(0.2)
        print("a part has ended: stopping the others", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for part in parts:
            part.terminate()
        for part in parts:
            try:
                part.wait(10)
            except subprocess.TimeoutExpired:
                part.kill()


if __name__ == "__main__":
    sys.exit(main())
