"""An environment broken in each way that can be broken here: one line each, with its remedy, and an exit status
that tells."""

import http.server, json, os, shutil, stat, subprocess, sys, threading
import pytest
import torch
from commands import typed
from fada import doctor
from fada.doctor import Finding, STATES, ready
from fada.registry import ASSETS
from fada.settings import load_settings

PLAIN = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'HF_TOKEN', 'HF_ENDPOINT', 'PYTHONPATH')}


def run(tmp_path, *words, settings='', path=None, stub=None, **env):
    "{check: finding} and exit status of a real `fada doctor` in a folder of its own"
    (tmp_path / 'settings.ini').write_text(settings)
    e = {
        **PLAIN,
        'HF_ENDPOINT': 'http://127.0.0.1:9',
        'HOME': str(tmp_path),
        'XDG_DATA_HOME': str(tmp_path / 'state'),
        **({'PATH': path} if path is not None else {}),
        **({'PYTHONPATH': str(stub)} if stub else {}),
        **env,
    }
    r = subprocess.run(
        [*typed('doctor --json'), *words],
        cwd=tmp_path,
        env=e,
        capture_output=True,
        text=True,
    )
    assert 'Traceback' not in r.stderr, r.stderr
    out = json.loads(r.stdout)
    assert out['ready'] == (r.returncode == 0)
    for f in out['findings']:
        assert f['state'] in STATES and (f['remedy'] or f['state'] == 'ok' or ';' in f['found']), f
        assert len(Finding(**f).line().splitlines()) == 1
    return {f['check']: f for f in out['findings']}, r.returncode


def broken(folder, **modules):
    "A folder of modules that fail on import, for PYTHONPATH"
    folder.mkdir()
    for name, error in modules.items():
        (folder / f'{name}.py').write_text(f'raise {error}\n')
    return folder


def program(folder, name, body):
    folder.mkdir(exist_ok=True)
    p = folder / name
    p.write_text(f'#!/bin/sh\n{body}\n')
    p.chmod(p.stat().st_mode | stat.S_IXUSR)
    return folder


def test_ready_where_all_is_there(tmp_path):
    f, code = run(tmp_path)
    assert code == 0 and {
        f[k]['state'] for k in ('python', 'packages', 'torch', 'settings', 'memory', 'model', 'disk')
    } == {'ok'}
    assert f['bitsandbytes']['state'] == 'ok' and ('CPU' in f['torch']['found']) == (torch.version.cuda is None)
    assert f['hub']['state'] == 'warns' and 'cannot be reached' in f['hub']['found']  # warned, and yet ready


def test_no_torch_no_transformers(tmp_path):
    stub = broken(
        tmp_path / 'stub',
        torch='ImportError("libcudart.so.12: cannot open")',
        transformers='ModuleNotFoundError("gone")',
    )
    f, code = run(tmp_path, stub=stub)
    assert code == 1 and f['torch']['state'] == f['packages']['state'] == 'fails'
    assert 'transformers (ModuleNotFoundError' in f['packages']['found'] and 'pip install' in f['packages']['remedy']


def test_many_things_at_once(tmp_path):
    """A bitsandbytes that does not load, no Chromium, a card that the CPU build cannot use, a folder that takes
    nothing, no downloads"""
    stub = broken(tmp_path / 'stub', bitsandbytes='OSError("undefined symbol")')
    here = program(tmp_path / 'bin', 'nvidia-smi', 'echo "NVIDIA GeForce RTX 4070 Laptop GPU, 550.1, 8188, 1210"')
    f, code = run(
        tmp_path,
        stub=stub,
        path=str(here),
        HF_HUB_OFFLINE='1',
        settings='[model]\nprecision = int8\n[output]\nfolder = /proc/fada\n',
    )
    assert code == 1 and f['bitsandbytes']['state'] == 'fails' and 'bf16' in f['bitsandbytes']['remedy']
    lacks = 'CPU build' if torch.version.cuda is None else 'cannot use NVIDIA GeForce RTX 4070'
    assert (
        f['torch']['state'] == 'warns'
        and lacks in f['torch']['found']
        and 'download.pytorch.org' in f['torch']['remedy']
    )
    assert f['driver']['state'] == 'ok' and '8.0 GiB of which 1.2 GiB are taken' in f['driver']['found']
    assert f['browser']['state'] == 'warns' and 'apt-get install chromium' in f['browser']['remedy']
    assert f['disk']['state'] == 'fails' and '/proc' in f['disk']['found']
    assert f['hub']['state'] == 'warns' and 'HF_HUB_OFFLINE' in f['hub']['found']


def test_bitsandbytes_matters_where_it_is_used(tmp_path, monkeypatch):
    stub = broken(tmp_path / 'stub', bitsandbytes='ImportError("no")')
    for name in [m for m in sys.modules if m.split('.')[0] == 'bitsandbytes']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(stub))
    s = load_settings(model='blip2-nano', precision='fp32')
    assert doctor.check_bitsandbytes(s).state == 'warns'
    s = load_settings(model='blip2-nano', precision='nf4')
    assert doctor.check_bitsandbytes(s).state == 'fails'


@pytest.mark.parametrize(
    'body', ['echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18', 'exit 0', 'kill -9 $$']
)
def test_a_driver_that_does_not_answer(tmp_path, monkeypatch, body):
    monkeypatch.setenv('PATH', f"{program(tmp_path / 'bin', 'nvidia-smi', body)}:/usr/bin:/bin")
    f = doctor.check_driver()
    assert f.state == 'warns' and 'does not answer' in f.found and 'reinstall' in f.remedy
    assert doctor.check_torch().state == 'ok'


def test_the_windows_wheel_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(program(tmp_path / 'bin', 'nvidia-smi', 'echo "RTX 4070, 550.1, 8188, 1210"')))
    monkeypatch.setattr('platform.system', lambda: 'Windows')
    monkeypatch.setattr('torch.version.cuda', None)
    f = doctor.check_torch()
    assert "Windows wheel is CPU only" in f.found and f.remedy.startswith('pip install torch --index-url')


@pytest.mark.parametrize(
    'version,state', [((3, 10, 9), 'fails'), ((3, 11, 0), 'ok'), ((3, 13, 1), 'ok'), ((3, 14, 0), 'fails')]
)
def test_python(version, state):
    assert doctor.check_python(version).state == state


@pytest.mark.parametrize(
    'settings,said',
    [
        ('[model]\nprecision = int4\n', 'int4'),
        ('[model]\nname = blip-nano\n', 'did you mean blip2-nano'),
        ('[modle]\nname = x\n', 'unknown setting'),
        ('[model]\nname = half\nprecision = fp16\n', 'does not run in fp16'),
        ('no section', 'not a readable settings file'),
    ],
)
def test_settings_that_cannot_be_used(settings, said, tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').write_text(settings)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'models.toml').write_text('[half]\nlike = "blip2-nano"\nprecisions = ["fp32", "bf16"]\n')
    f, s = doctor.check_settings()
    assert f.state == 'fails' and said in f.found and s is None


def test_device_memory_and_model(tmp_path, monkeypatch):
    "A card that is not there; a model that no machine holds; one that is not here; one that is damaged"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path / 'state'))
    (tmp_path / 'settings.ini').touch()
    f = doctor.check_device(load_settings(device='cuda:7'))
    assert f.state == 'fails' and 'cuda' in f.found
    shutil.copytree(ASSETS / 'blip2-nano', tmp_path / 'bad')
    shard = tmp_path / 'bad' / 'model.safetensors'
    shard.write_bytes(shard.read_bytes()[:5000])
    (tmp_path / 'models.toml').write_text(
        '[huge]\nlike = "blip2-opt-2.7b"\nparameters = 9_000_000_000_000\n'
        '[bad]\nlike = "blip2-nano"\ncheckpoint = "bad"\n'
    )
    f = doctor.check_free(load_settings(model='huge', precision='nf4'))
    assert f.state == 'fails' and 'fada plan huge' in f.remedy
    f = doctor.check_model(load_settings(model='florence-2-large'))
    assert f.state == 'fails' and 'fada models get florence-2-large' in f.found
    f = doctor.check_model(load_settings(model='bad'))
    assert f.state == 'fails' and 'damaged shard' in f.found
    assert not ready([f]) and ready([doctor.check_browser()])


def test_a_service_and_an_ensemble_can_run_or_say_why(tmp_path, monkeypatch):
    "The gate, the key, the SDK; an ensemble by each of its parts"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path / 'state'))
    (tmp_path / 'models.toml').write_text("""[ours]
like = "openai"
service = {url = "http://127.0.0.1:9/v1"}
[both]
like = "ensemble"
parts = {structures = "ours", others = "blip2-nano", wording = "medgemma-4b-text"}
[twice]
like = "ensemble"
parts = {structures = "blip2-nano", others = "blip2-nano"}
[odd]
like = "ensemble"
parts = {others = "blip3-nano"}
""")

    def look(name, allowed='yes'):
        (tmp_path / 'settings.ini').write_text(f'[remote]\nallowed = {allowed}\n')
        return doctor.check_model(load_settings(model=name))

    assert look('ours').state == look('twice').state == 'ok'
    f = look('ours', 'no')
    assert f.state == 'fails' and '[remote] allowed = yes' in f.found and not ready([f])
    f = look('both', 'no')
    assert f.state == 'fails' and '[remote] allowed' in f.found and 'fada models get medgemma-4b-text' in f.found
    f = look('both')
    assert f.state == 'fails' and '[remote]' not in f.found and 'medgemma-4b-text' in f.found
    f = look('odd')
    assert f.state == 'fails' and 'did you mean blip2-nano' in f.found
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    f = look('openai')
    assert f.state == 'fails' and 'OPENAI_API_KEY' in f.found
    monkeypatch.setitem(sys.modules, 'openai', None)  # as if it were not installed
    f = look('ours')
    assert f.state == 'fails' and 'pip install' in f.found


def test_a_full_disk(tmp_path):
    "A file system of 64 KiB, written full"
    at = tmp_path / 'small'
    at.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(at)], capture_output=True).returncode:
        pytest.skip('no file system can be mounted here')
    try:
        f = doctor.check_disk(load_settings(output=str(at / 'runs')))
        assert f.state == 'fails' and str(at) in f.found and 'free space' in f.remedy and not list(at.iterdir())
    finally:
        subprocess.run(['umount', str(at)], check=True)


def test_browser_and_hub(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert 'no Chromium' in doctor.check_browser().found
    program(tmp_path, 'chromium', 'exit 127')
    assert 'does not start' in doctor.check_browser().found
    program(tmp_path, 'chromium', 'echo Chromium 150')
    assert doctor.check_browser().state == 'ok'
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(401)
            self.end_headers()

        def log_message(self, *a):
            pass

    server = http.server.HTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    f = doctor.check_hub()
    assert f.state == 'ok' and 'a token is set' in f.found and 'hf_secret' not in f.line()
    server.shutdown()
    server.server_close()
    assert doctor.check_hub(1).state == 'warns'
    for bad in ('nonsense', 'http://nowhere.invalid'):
        monkeypatch.setenv('HF_ENDPOINT', bad)
        assert doctor.check_hub(1).state == 'warns'


def test_downloads_without_room_to_write(monkeypatch):
    monkeypatch.setenv('HF_HOME', '/proc/fada')
    f = doctor.check_downloads(load_settings(model='blip2-opt-2.7b'))
    assert f.state == 'warns' and 'HF_HOME' in f.remedy
