"An adapter sent to a hub on loopback: allowed by settings, private, and without what names a patient's image."

import json, os, subprocess, sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hub import Hub
from commands import typed
from fada.finetune import finetune
from fada.vlm import load


@pytest.fixture(scope='module')
def adapter(small_data, tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'adapter'
    finetune(
        load('blip2-nano', device='cpu', precision='fp32', max_new_tokens=8),
        small_data,
        ['Femur'],
        out,
        steps=2,
        batch=4,
        checks=1,
        validation_images=4,
        images=8,
        skip_preflight=True,
    )
    return out


@pytest.fixture
def hub(tmp_path):
    h = Hub({}, tmp_path / 'hub')
    yield h
    h.close()


def push(hub, folder, repo, *more, allowed='yes', token='hf_good', **env):
    (folder / 'settings.ini').write_text(f'[hub]\npush = {allowed}\n')
    env = dict(
        os.environ,
        HF_ENDPOINT=hub.url,
        HF_TOKEN=token,
        HF_HUB_OFFLINE='0',
        HF_HUB_DISABLE_XET='1',
        HF_HOME=str(folder / 'home'),
        PYTHONPATH=str(Path(__file__).parents[1]),
        **env,
    )
    return subprocess.run(
        [*typed('push {path} {repo}', path=more[0], repo=repo), *more[1:], '--json', '--quiet'],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )


def test_a_private_repository_without_names(adapter, hub, tmp_path, small_data):
    """Weights byte for byte; no image, no folder of this machine, no single answer in any file; it loads from what
    arrived"""
    r = push(hub, tmp_path, 'group/femur', adapter)
    assert r.returncode == 0, r.stderr
    said, at = json.loads(r.stdout), hub.repositories['group/femur']
    assert said['private'] and 'group/femur' in hub.private
    assert (
        sorted(p.name for p in at.iterdir())
        == said['files']
        == ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'fada.json', 'features.npz']
    )
    assert (at / 'adapter_model.safetensors').read_bytes() == (adapter / 'adapter_model.safetensors').read_bytes()
    text = ''.join((at / n).read_text() for n in ('README.md', 'adapter_config.json', 'fada.json'))
    assert (
        '.png' not in text
        and str(adapter.parents[1]) not in text
        and 'assets' not in text
        and 'samples' not in text
        and 'vocabulary' not in text
    )
    assert load('blip2-nano', at, device='cpu', precision='fp32').adapter is not None


def test_what_is_refused(adapter, hub, tmp_path):
    """No consent, a wrong token, no repository's name, a public one, no hub: one sentence each, and nothing has
    been sent"""

    def refused(said, *a, **kw):
        r = push(hub, tmp_path, *a, **kw)
        assert r.returncode == 1 and said in r.stderr and len(r.stderr.strip().splitlines()) == 1, r.stderr

    refused('push = yes', 'group/femur', adapter, allowed='no')
    refused('owner/name', 'femur', adapter)
    assert hub.requests == []
    refused('token that may write', 'group/femur', adapter, token='hf_bad')
    assert hub.repositories == {}
    (tmp_path / 'open').mkdir()
    hub.repositories['group/open'] = tmp_path / 'open'
    refused('the repository is public', 'group/open', adapter)
    assert not list((tmp_path / 'open').iterdir())
    assert (
        push(hub, tmp_path, 'group/open', adapter, '--public').returncode == 0
        and (tmp_path / 'open' / 'README.md').is_file()
    )
    hub.close()
    refused('cannot be reached', 'group/femur', adapter)
