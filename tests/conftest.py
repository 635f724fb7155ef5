"What the tests share: a quiet environment, and the commands as a person would run them."
import contextlib, functools, multiprocessing, os, signal, subprocess, sys, tempfile
from pathlib import Path
import pytest, torch

root = Path(__file__).resolve().parent.parent
quiet = dict(WANDB_MODE='offline', WANDB_SILENT='true', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1', MPLBACKEND='agg')
os.environ.update(quiet | {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')})


@pytest.fixture
def shared()->Path:
    "The folder of real texts beside the project; tests that need it are skipped where it is absent."
    folder = root.parent/'shared'
    if not folder.is_dir(): pytest.skip(f'{folder.name}/ with the real texts is not beside the project')
    return folder


names = {'llmlab_eval': 'evaluate'} # doors whose function has another name


def command(door:str, *words:str)->list[str]:
    "A command line that runs a door of this environment, whether or not its scripts are on PATH."
    return [sys.executable, '-c', f'from llmlab.cli import {names.get(door, door.removeprefix("llmlab_"))} as d; d()', *words]


def _be_door(door:str, words:tuple[str, ...], cwd:str, env:dict[str, str], streams:tuple[str, str, str], first:str)->None:
    "In a process of its own: be that command."
    os.chdir(cwd)
    os.environ.clear(); os.environ.update(env)
    for fd, (name, mode) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))): os.dup2(os.open(name, mode), fd)
    sys.argv = [door, *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import llmlab.cli
    exec(first, {})
    getattr(llmlab.cli, names.get(door, door.removeprefix('llmlab_')))()


@functools.cache
def ready():
    "A process that has loaded what the commands load, and is copied for each: they begin in a tenth of a second instead of four."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['conftest', 'llmlab.recipes', 'llmlab.cli', 'torch.utils.tensorboard', 'matplotlib.pyplot', 'wandb'])
    return context


class Running:
    "A command in a process of its own, from its first line to its exit code, without the loading. It is asked as a `Popen` is."
    def __init__(self, door:str, *words:str, cwd:Path, first:str='', **env:str): # first: Python that it runs before
        self.words, self.place = [door, *words], tempfile.TemporaryDirectory()
        self.streams = (os.devnull, f'{self.place.name}/out', f'{self.place.name}/err')
        for name in self.streams[1:]: Path(name).touch()
        self.process = ready().Process(target=_be_door, args=(door, words, str(cwd), os.environ | env, self.streams, first))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self)->int|None: return self.process.exitcode
    @property
    def out(self)->str: return Path(self.streams[1]).read_text()
    @property
    def err(self)->str: return Path(self.streams[2]).read_text()
    def poll(self)->int|None: return self.process.exitcode
    def send_signal(self, number:int)->None:
        with contextlib.suppress(ProcessLookupError): os.kill(self.pid, number)
    def wait(self, timeout:float=300)->int:
        self.process.join(timeout)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired(self.words, timeout)
        return self.process.exitcode


def run_door(door:str, *words:str, cwd:Path, timeout:float=300)->subprocess.CompletedProcess:
    "A command, to its end."
    p = Running(door, *words, cwd=cwd)
    try: p.wait(timeout)
    except subprocess.TimeoutExpired: p.send_signal(signal.SIGKILL); p.wait(); raise
    return subprocess.CompletedProcess(p.words, p.returncode, p.out, p.err)


@pytest.fixture
def llmlab(tmp_path):
    "Run a door in an empty folder: llmlab('llmlab_train', '--config', 'tiny_test') gives the finished process. With variables of the environment it is started from nothing."
    def run(door:str, *words:str, cwd:Path=tmp_path, timeout:float=300, **env:str)->subprocess.CompletedProcess:
        if not env: return run_door(door, *words, cwd=cwd, timeout=timeout)
        return subprocess.run(command(door, *words), cwd=cwd, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              env=os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'} | env)
    return run


@pytest.fixture(scope='module')
def one_thread():
    "Tiny tensors: a second thread only waits, and badly so on busy cores."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items:list)->None:
    "What waits for jobs, browsers and terminals begins first: the other workers fill the time."
    waiting = ('test_slurm', 'test_site', 'test_lab', 'test_menu')
    items.sort(key=lambda item: waiting.index(item.path.stem) if item.path.stem in waiting else len(waiting))
