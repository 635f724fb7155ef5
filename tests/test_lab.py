"JupyterLab as a person uses it: a page is opened in a browser, changed and run; a run is watched; the kernel is interrupted, and the run goes on."
import base64, contextlib, json, os, re, shutil, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
browser_program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def surroundings(room:Path)->dict:
    "An environment for Jupyter with settings of its own, and no colours or windows of ours."
    env = {k: v for k, v in os.environ.items() if k not in ('MPLBACKEND', 'IN_TEST')}
    env |= {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    for name in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR'):
        env[name] = str(room/name.lower())
        (room/name.lower()).mkdir(parents=True, exist_ok=True)
    return env


# --- the kernel is interrupted

def kernel_says(client, code, hear=lambda message: None):
    "Run code in a kernel; all its messages."
    asked, heard = client.execute(code), []
    while True:
        message = client.get_iopub_msg(timeout=120)
        if message['parent_header'].get('msg_id') != asked: continue
        heard.append(message); hear(message)
        if message['msg_type'] == 'status' and message['content']['execution_state'] == 'idle': return heard


def curve(html:str)->int:
    "Points of the training curve in a display."
    svg = base64.b64decode(re.search(r'base64,([^"]+)"', html)[1]).decode()
    return len(re.findall(r'[ML][\d.]+ [\d.]+', re.search(r'<path d="([^"]+)" fill="none" stroke="#3a87c8"', svg)[1]))


def test_interrupting_the_kernel_saves_and_the_next_cell_goes_on(tmp_path):
    client_of = pytest.importorskip('jupyter_client', reason='jupyter_client is not installed')
    pytest.importorskip('ipykernel', reason='ipykernel is not installed')
    manager = client_of.KernelManager(kernel_name='python3')
    manager.start_kernel(env=surroundings(tmp_path), cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(60)
        shown, lines = [], "'run.name=x', 'trainer.max_steps=9999', 'trainer.log_interval=2', 'trainer.eval_interval=9999', 'tracking.tensorboard=false', 'tracking.wandb=off'"
        def interrupt_soon(message):
            if message['msg_type'] != 'update_display_data': return
            shown.append(message)
            if len(shown) == 1: manager.interrupt_kernel()
        heard = kernel_says(client, f'from llmlab import tiny\nfrom llmlab.recipes import pretrain, resume_settings\nmine = 1\nresult = pretrain(tiny.config({lines}))', interrupt_soon)
        error, = (m['content'] for m in heard if m['msg_type'] == 'error')
        said = '\n'.join(error['traceback'])
        step = int(re.fullmatch(r"Interrupted after step (\d+)\. The checkpoint runs/x/checkpoints/step-0*\1 is complete\. To go on:\n"
                                r"    cfg, folder = resume_settings\('runs/x'\)\n    pretrain\(cfg, resume=folder\)", said)[1]) # this, and no traceback
        last = shown[-1]['content']
        assert len([m for m in heard if m['msg_type'] == 'display_data']) == 1 and len({m['content']['transient']['display_id'] for m in shown}) == 1
        assert last['data']['text/plain'].startswith(f'Stopped after step {step} of 9,999') and '<img' in last['data']['text/html']
        assert (tmp_path/f'runs/x/checkpoints/step-{step:08d}/complete.json').exists() and json.loads((tmp_path/'runs/x/status.json').read_text())['state'] == 'stopped'
        # the kernel is as it was, without the network that was trained; and what was said is what goes on
        on = said.split('\n', 1)[1].replace('    ', '').replace("('runs/x')", f"('runs/x', ['trainer.max_steps={step+4}'])")
        heard = kernel_says(client, f'import gc, torch\ngc.collect()\nleft = sum(isinstance(o, torch.nn.Module) for o in gc.get_objects())\n{on}\nprint(mine, left)')
        assert not [m for m in heard if m['msg_type'] == 'error'], heard
        assert ''.join(m['content']['text'] for m in heard if m['msg_type'] == 'stream').splitlines()[-1] == '1 0'
        last = [m for m in heard if m['msg_type'] == 'update_display_data'][-1]['content']['data']
        assert last['text/plain'].startswith(f'Done: step {step+4} of {step+4}') and curve(last['text/html']) >= step//2 # from its start
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# --- in a browser

PAGE = 'first_run.ipynb'


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on loopback, in an empty folder with a copy of the first tutorial; its address."
    pytest.importorskip('jupyterlab', reason='jupyterlab is not installed (pip install jupyterlab)')
    pytest.importorskip('playwright', reason='playwright is not installed (pip install playwright)')
    if not browser_program: pytest.skip('there is no chromium on this machine (apt-get install chromium)')
    room = tmp_path_factory.mktemp('lab')
    env, folder = surroundings(room), room/'pages'
    folder.mkdir()
    shutil.copy(root/'nbs'/'tutorials'/PAGE, folder)
    config = Path(env['JUPYTER_CONFIG_DIR'])/'labconfig'
    config.mkdir()
    (config/'page_config.json').write_text(json.dumps({'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}})) # it asks the network
    (config/'default_setting_overrides.json').write_text(json.dumps({'@jupyterlab/notebook-extension:tracker': {'windowingMode': 'none'}, '@jupyterlab/docmanager-extension:plugin': {'autosave': False}}))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with open(room/'lab.log', 'w') as log:
        process = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
                                    '--IdentityProvider.token=lab', '--LabApp.expose_app_in_browser=True', f'--ServerApp.root_dir={folder}'], cwd=folder, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    base, until = f'http://127.0.0.1:{port}', time.monotonic()+90
    while True:
        try:
            with urllib.request.urlopen(f'{base}/api/status?token=lab', timeout=5): break
        except OSError:
            assert process.poll() is None and time.monotonic() < until, (room/'lab.log').read_text()[-3000:]
            time.sleep(.1)
    yield base
    process.send_signal(signal.SIGTERM) # ends its kernels too
    try: process.wait(20)
    except subprocess.TimeoutExpired: process.kill()


@pytest.fixture(scope='module')
def pictures(tmp_path_factory)->Path:
    "Where the pictures go: LLMLAB_PICTURES, or a temporary folder."
    folder = Path(os.environ.get('LLMLAB_PICTURES') or tmp_path_factory.mktemp('pictures'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def saved(base:str)->dict:
    "The page as it lies on the disk: the truth about a notebook."
    with urllib.request.urlopen(f'{base}/api/contents/{PAGE}?token=lab', timeout=10) as f: return json.load(f)['content']


def menu(page, *names:str)->None:
    "Choose from the menu bar."
    page.get_by_role('menuitem', name=names[0], exact=True).click()
    for name in names[1:]: page.get_by_role('menuitem', name=re.compile('^'+re.escape(name))).first.click()


def idle(page)->None: page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(timeout=120_000)


def open_page(page, base:str, name:str)->None:
    "Open a notebook, and wait for its cells and its kernel. A fresh server may ask which kernel: take the one it offers."
    page.goto(f'{base}/lab/tree/{name}?token=lab&reset', wait_until='domcontentloaded')
    page.locator('.jp-NotebookPanel .jp-Cell').first.wait_for(timeout=120_000)
    select, ready = page.locator('.jp-Dialog .jp-mod-accept', has_text='Select'), "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"
    for _ in range(1200):
        if select.is_visible(): select.click()
        elif page.evaluate(ready): return idle(page)
        page.wait_for_timeout(100)
    raise AssertionError('the kernel did not start')


DONE = """() => {
  const cells = [...document.querySelectorAll('.jp-CodeCell')].filter(c => c.querySelector('.cm-content')?.textContent.trim());
  const prompt = c => c.querySelector('.jp-InputPrompt').textContent.trim();
  const failed = document.querySelector('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"] .ansi-red-fg') !== null;
  return !cells.some(c => prompt(c).includes('*')) && (failed || cells.every(c => /^\\[\\d+\\]/.test(prompt(c))));
}"""


def save(page, base:str)->dict:
    "Save as a person does, and read what was written. (Not before it is: a server that is asked for half a file takes it for a damaged one, and puts the old one back.)"
    menu(page, 'File', 'Save Notebook')
    page.wait_for_function('() => !window.jupyterapp.shell.currentWidget.context.model.dirty', timeout=60_000)
    return saved(base)


@contextlib.contextmanager
def browser_page(base:str, problems:list[str], failed:Path):
    from playwright.sync_api import sync_playwright
    quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_program, args=quiet)
        page = browser.new_page(viewport={'width': 1300, 'height': 950})
        page.on('pageerror', lambda e: problems.append(f'pageerror {e}'))
        page.on('requestfailed', lambda r: None if r.url.startswith(base) else problems.append(f'off-host {r.url}'))
        try: yield page
        except Exception: page.screenshot(path=failed); raise
        finally: browser.close()


def test_the_first_tutorial_in_jupyterlab(lab, pictures):
    "Opened, a cell typed into, restarted, all cells run: none failed, what was typed ran, and the live display is in the page and in the file."
    problems, look = [], '.jp-OutputArea-output .llmlab-run'
    with browser_page(lab, problems, pictures/'lab-failed.png') as page:
        open_page(page, lab, PAGE)
        if (before := page.locator(look)).count(): before.first.scroll_into_view_if_needed()
        page.screenshot(path=pictures/'lab-opened.png')
        editor = page.locator('.jp-CodeCell .cm-content').first
        editor.scroll_into_view_if_needed()
        editor.click()
        page.keyboard.press('Control+End')
        page.keyboard.type("\nprint('typed in a browser')")
        menu(page, 'Kernel', 'Restart Kernel and Run All Cells')
        page.locator('.jp-Dialog .jp-mod-accept', has_text='Restart').click()
        page.locator(look).first.wait_for(timeout=120_000)
        page.wait_for_function(f"() => document.querySelector('{look} img') !== null", timeout=120_000)
        page.locator(look).first.scroll_into_view_if_needed()
        page.screenshot(path=pictures/'lab-running.png')
        page.wait_for_function(DONE, timeout=240_000)
        idle(page)
        book = save(page, lab)
        shape = page.locator(f'{look} img').first
        shape.scroll_into_view_if_needed()
        box = shape.bounding_box()
        assert shape.is_visible() and box['width'] > 200 and box['height'] > 80
        page.screenshot(path=pictures/'lab-light.png')
        page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'", timeout=30_000)
        page.wait_for_timeout(300)
        page.screenshot(path=pictures/'lab-dark.png')
    outputs = [o for c in book['cells'] for o in c.get('outputs', [])]
    assert not [o for o in outputs if o['output_type'] == 'error'], [o for o in outputs if o['output_type'] == 'error']
    assert any(o.get('text', '').startswith('typed in a browser') for o in outputs)
    shown, = (o['data'] for o in outputs if 'llmlab-run' in o.get('data', {}).get('text/html', ''))
    assert shown['text/plain'].startswith('Done: step ') and 'data:image/svg' in shown['text/html'] and len(shown['text/html']) < 60_000
    assert not problems, problems
