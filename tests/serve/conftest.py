"""A tiny pipeline that generates in milliseconds, and servers of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import pytest
import torch

from ldm.models.adapter_file import write_adapter
from ldm.models.text_encoder import TextEncoder, label_encoder
from ldm.pipeline import load_pipeline
from ldm.serve.queue import Queue
from ldm.serve.worker import Worker
from ldm.training.adapters import Adapter, AdapterConfig


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, make_pipeline):
    """The directory of a pipeline with random weights and a real tokenizer; images of 16 pixels, widths in multiples of 4."""
    path = tmp_path_factory.mktemp("serve") / "tiny"
    made = make_pipeline()
    made.register_to_config(trained_on={"latent_shape": [4, 8, 8], "latent_shapes": [[4, 8, 8], [4, 8, 16]]})
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter_path(model_path):
    """The directory of an adapter of that model, with random weights."""
    network = load_pipeline(model_path, "cpu").transformer
    torch.manual_seed(0)
    adapter = Adapter(AdapterConfig(rank=2, alpha=16), network, "tiny")
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    path = model_path.parent / "dog" / "adapter"
    write_adapter(path, *adapter.exported(), adapter.record({}, ["sks dog"]))
    return path


@pytest.fixture(scope="session")
def worker(model_path, adapter_path):
    return Worker(load_pipeline(model_path), model_path, [f"{adapter_path}=0.5"])


@pytest.fixture(scope="session")
def worker_of(tmp_path_factory, make_pipeline):
    """Makes workers of models that take class names, or no prompts at all."""

    def make(*classes: str) -> Worker:
        path = tmp_path_factory.mktemp("classes") / "tiny"
        words = TextEncoder(*label_encoder(classes), "classes")
        make_pipeline(words=words).save_pretrained(path)
        return Worker(load_pipeline(path), path)

    return make


@contextlib.contextmanager
def serve(model_path, adapter_path):
    """``ldm serve`` as a process, and its address."""
    options = ["--lora", f"{adapter_path}=0.5", "--port", "0", "--max-steps", "2000"]
    command = [sys.executable, "-m", "ldm", "serve", str(model_path), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and "serves tiny" in line
        yield process, line.split()[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def own_server(model_path, adapter_path):
    """A server for one test: its process and address."""
    with serve(model_path, adapter_path) as process_and_address:
        yield process_and_address


@pytest.fixture(scope="session")
def address(model_path, adapter_path):
    """The address of a server for all tests that leave it running; it takes seconds to start."""
    with serve(model_path, adapter_path) as (_, address):
        yield address


@pytest.fixture
def queue():
    made = Queue(max_waiting=16)
    yield made
    made.close()
    assert made.join(20)


@pytest.fixture
def soon():
    """A function that waits for a condition."""

    def wait(condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "timeout"
            time.sleep(0.005)

    return wait
