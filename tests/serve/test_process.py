"""``ldm serve`` as a process: how it starts, how it ends."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from ldm.cli import main

COMMAND = [sys.executable, "-m", "ldm", "serve"]


@pytest.fixture
def serving(model_path):
    """A server, and its port."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*COMMAND, model_path, "--port", "0"], text=True, **pipes)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and "draws with tiny" in line
        yield process, int(line.split()[0].rpartition(":")[2])
    finally:
        process.kill()
        process.wait()


def begin(port, steps=150):
    """A connection on which something long is being drawn."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"settings": {"prompt": "a ring", "steps": steps, "width": 512, "height": 512}})
    connection.request("POST", "/draw", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    while "step" not in json.loads(response.readline()):
        pass
    return connection, response


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_within_seconds_also_while_drawing(serving, number):
    process, port = serving
    connection, response = begin(port)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(20) == 0 and time.monotonic() - began < 15
    assert process.stdout.read().strip() == "stopped" and "Traceback" not in process.stderr.read()
    assert '"done"' not in response.read().decode()
    connection.close()


@pytest.mark.slow
def test_a_client_that_goes_leaves_the_machine_to_the_next(serving):
    _, port = serving
    connection, response = begin(port)
    response.close()
    connection.close()
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"settings": {"prompt": "a ring", "steps": 1}})
    connection.request("POST", "/draw", body, {"Content-Type": "application/json"})
    assert b'"done"' in connection.getresponse().read()
    connection.request("GET", "/images")
    assert len(json.loads(connection.getresponse().read())) == 1 and time.monotonic() - began < 30
    connection.close()


def refusal(capsys, *arguments):
    """What is said when it does not start, and the exit code."""
    with pytest.raises(SystemExit) as end:
        main(["serve", *map(str, arguments)])
    return end.value.code, capsys.readouterr().err.splitlines()


def test_what_cannot_be_served_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, (line,) = refusal(capsys, tmp_path, "--port", port)
        assert code == 2 and line.startswith(f"ldm: cannot listen at 127.0.0.1 port {port} (")
    code, (line,) = refusal(capsys, tmp_path, "--port", 70000)
    assert code == 2 and line.startswith("ldm: cannot listen at 127.0.0.1 port 70000 (")
    code, (line,) = refusal(capsys, tmp_path, "--port", 0)
    assert code == 2 and "is not a pipeline directory" in line
    code, (line,) = refusal(capsys, tmp_path, "--port", 0, "--max-steps", 0)
    assert (code, line) == (2, "ldm: the limit on steps is 0; give 1 or more")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, (line,) = refusal(capsys, tmp_path, "--port", 0)
    assert code == 2 and line.endswith("run: pip install 'ldm[serve]'")


def test_it_warns_when_others_can_reach_it(tmp_path, capsys):
    code, (warning, line) = refusal(capsys, tmp_path, "--port", 0, "--host", "0.0.0.0")
    assert warning.startswith("ldm: warning: anyone who can reach 0.0.0.0 can draw here") and "not a pipeline" in line
    code, lines = refusal(capsys, tmp_path, "--port", 0, "--host", "localhost")
    assert (code, len(lines)) == (2, 1)
