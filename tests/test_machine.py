"The machine: what is chosen, and that it is said."
import subprocess, sys
import pytest, torch
from llmlab.config import Run
from llmlab.files import ConfigError
from llmlab.trainer import machine
from llmlab.trainer.machine import Machine, choose_compile, choose_precision, make_deterministic, matmul_peak, set_up


@pytest.fixture(autouse=True)
def as_before():
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    make_deterministic(deterministic)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision('highest')


@pytest.mark.parametrize('native', [True, False])
def test_auto_precision_asks_the_processor(monkeypatch, native):
    monkeypatch.setattr(machine, 'computes_bf16', lambda device: native)
    dtype, why = choose_precision('auto', torch.device('cpu'))
    assert dtype == (torch.bfloat16 if native else torch.float32) and 'the processor' in why
    assert ('emulates' in choose_precision('bf16', torch.device('cpu'))[1]) == (not native)
    assert choose_precision('fp16', torch.device('cpu'))[0] == torch.float16


def test_compile_needs_a_compiler(monkeypatch):
    cpu = torch.device('cpu')
    assert choose_compile('auto', cpu)[0] is False
    monkeypatch.setattr(machine.shutil, 'which', lambda name: None)
    with pytest.raises(ConfigError, match='compiler'): choose_compile(True, cpu)
    assert choose_compile(False, cpu) == (False, 'not compiled: as set')


def test_set_up_says_everything_once():
    said = []
    m = set_up(Run(device='cpu', precision='bf16', threads=1), say=said.append)
    assert len(said) == 1 and all(note in said[0] for note in m.notes) and 'deterministic' in said[0]
    assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
    with m.autocast(): assert (torch.ones(2, 2)@torch.ones(2, 2)).dtype == torch.bfloat16
    assert not m.scaler().is_enabled() and Machine(dtype=torch.float16).scaler().is_enabled()


def test_a_missing_device_is_an_error():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(ConfigError, match='run.device=auto'): set_up(Run(device='cuda'))


def test_peak_is_measured_once_and_cheap():
    import time
    start = time.perf_counter()
    peak = matmul_peak('cpu', torch.float32, seconds=.05)
    first = time.perf_counter()-start
    assert peak > 1e8 and matmul_peak('cpu', torch.float32, seconds=.05) == peak
    assert first < 30 # a guard against hanging, not a measurement


def test_importing_the_trainer_stays_light():
    code = 'import sys, llmlab.trainer.loop, llmlab.trainer.runs, llmlab.trainer.plots; print([m for m in ("transformers", "datasets", "wandb", "matplotlib", "tensorboard", "tiktoken") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    lighter = 'import sys, llmlab.launch.slurm, llmlab.trainer.tracking; print([m for m in ("torch", "numpy") if m in sys.modules])' # asked before and after every job of a chain
    assert subprocess.run([sys.executable, '-c', lighter], capture_output=True, text=True, check=True).stdout.strip() == '[]'
