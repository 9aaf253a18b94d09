"""``ldm serve`` as a process: start and end."""

import http.client
import json
import signal
import socket
import sys
import time

import pytest

from ldm.cli import main


def request(address, steps, side):
    """A response that streams the progress of an image."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    body = json.dumps({"settings": {"prompt": "a ring", "steps": steps, "width": side, "height": side}})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    return connection, response


def begin(address):
    """A response whose image is being generated, which takes long."""
    connection, response = request(address, steps=2000, side=256)
    while "step" not in json.loads(response.readline()):
        pass
    return connection, response


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_within_seconds_while_an_image_is_generated(own_server, number):
    process, address = own_server
    connection, response = begin(address)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(20) == 0 and time.monotonic() - began < 15
    assert process.stdout.read().strip() == "stopped" and "Traceback" not in process.stderr.read()
    assert '"done"' not in response.read().decode()
    connection.close()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(own_server):
    process, address = own_server
    connection, _ = begin(address)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    *warned, last = process.stderr.read().splitlines()
    assert last == "ldm: interrupted" and all("far from the sizes" in line for line in warned)
    connection.close()


@pytest.mark.slow
def test_a_job_survives_its_client_and_cancelling_it_frees_the_server(address):
    connection, response = begin(address)
    job = response.headers["Location"]
    response.close()
    connection.close()
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("GET", "/jobs")
    listed = json.loads(connection.getresponse().read())[-1]
    assert f"/jobs/{listed['id']}" == job and listed["state"] == "working"
    connection.request("DELETE", job)
    assert connection.getresponse().read() == b"null"
    connection.close()
    began = time.monotonic()
    connection, response = request(address, steps=1, side=16)
    done = json.loads(response.read().splitlines()[-1])
    assert done["state"] == "done" and time.monotonic() - began < 30
    connection.request("GET", "/images")
    stored = json.loads(connection.getresponse().read())
    assert stored[-1] == done["image"] and all(image["settings"]["steps"] < 2000 for image in stored)
    connection.close()


def refusal(capsys, *arguments):
    """Exit code and stderr of a server that does not start."""
    with pytest.raises(SystemExit) as end:
        main(["serve", *map(str, arguments)])
    return end.value.code, capsys.readouterr().err.splitlines()


def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 70000):
            code, (line,) = refusal(capsys, tmp_path, "--port", port)
            assert code == 2 and line.startswith(f"ldm: cannot listen at 127.0.0.1 port {port} (")
    code, (line,) = refusal(capsys, tmp_path, "--port", 0)
    assert code == 2 and "is not a pipeline directory" in line
    code, (line,) = refusal(capsys, tmp_path, "--port", 0, "--max-steps", 0)
    assert (code, line) == (2, "ldm: the limit on steps is 0; give 1 or more")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, (line,) = refusal(capsys, tmp_path, "--port", 0)
    assert code == 2 and line.endswith("run: pip install 'ldm[serve]'")


def test_it_warns_when_others_can_reach_it(tmp_path, capsys):
    code, (warning, line) = refusal(capsys, tmp_path, "--port", 0, "--host", "0.0.0.0")
    assert warning.startswith("ldm: warning: anyone who can reach 0.0.0.0 can generate images") and "not a pipeline" in line
    code, lines = refusal(capsys, tmp_path, "--port", 0, "--host", "localhost")
    assert (code, len(lines)) == (2, 1)
