"Downloads from a hub on loopback, and every checkpoint that must be refused: one clear error each."

import json, os, re, shutil, struct, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hub import Hub
from tiny import tiny
from fada.checkpoints import load_model, resolve_device, shards
from fada.registry import MODELS
from fada.settings import FadaError
from fada.vlm import load


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return tiny('smolvlm', tmp_path_factory.mktemp('tiny'))[2]


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / 'copy'))


@pytest.fixture
def machine(tmp_path, checkpoint):
    """A machine of its own: empty cache and state, a hub with one model (and pickles and code beside it), a
    row that names it"""
    shutil.copytree(checkpoint, tmp_path / 'repo')
    for name in ('pytorch_model.bin', 'modeling_own.py', 'README.md'):
        (tmp_path / 'repo' / name).write_text('x')
    hub = Hub({'group/tiny': tmp_path / 'repo'})
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'models.ini').write_text('[ours]\nlike = smolvlm-256m\ncheckpoint = group/tiny\n')
    env = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'HF_TOKEN')}
    env |= dict(
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path / 'hf'),
        XDG_DATA_HOME=str(tmp_path / 'state'),
        HF_HUB_DISABLE_XET='1',
        HF_HUB_DOWNLOAD_TIMEOUT='5',
        FADA_QUIET='1',
    )

    def fada(*words, **more):
        return subprocess.run(
            [sys.executable, '-m', 'fada.cli', *words],
            cwd=tmp_path,
            env={**env, **more},
            capture_output=True,
            text=True,
        )

    hub.fada, hub.folder = fada, tmp_path
    yield hub
    hub.close()


def test_get_says_size_and_takes_only_safetensors(machine):
    r = machine.fada('models', 'get', 'ours')
    assert r.returncode == 0, r.stderr
    assert r.stderr.startswith('ours: 0.00 GB in ') and 'group/tiny@c0ffee' in r.stderr
    kept = {p.name for p in (machine.folder / 'hf').rglob('*') if p.is_file()}
    assert 'config.json' in kept and any(n.endswith('.safetensors') for n in kept)
    assert not kept & {'pytorch_model.bin', 'modeling_own.py', 'README.md'} and not any(
        '.bin' in p or '.py' in p for _, p, _ in machine.requests
    )
    state = json.loads(machine.fada('models', 'access', 'ours', '--json').stdout)
    assert state['downloaded'] and state['next'] == 'run `fada models test ours`'


@pytest.mark.slow
def test_test_ticks_the_row_without_network(machine):
    assert machine.fada('models', 'get', 'ours').returncode == 0
    machine.close()  # no network from here on
    r = machine.fada('models', 'test', 'ours', '--precision', 'fp32', '--json', HF_HUB_OFFLINE='1')
    assert r.returncode == 0, r.stderr
    tried = json.loads(r.stdout)
    assert tried['answer'] is True and tried['train'] is True and len(tried['answers']) == 8
    state = json.loads(machine.fada('models', 'access', 'ours', '--json', HF_HUB_OFFLINE='1').stdout)
    assert state['downloaded'] and state['tests']['fp32']['train'] is True and state['next'] == ''
    shown = machine.fada('models', 'show', 'ours', HF_HUB_OFFLINE='1').stdout  # its dossier, measured rows among it
    assert 'tested in fp32' in shown and 'fp32: answer, train, attention' in shown and 'ms a question, peak' in shown
    listed = json.loads(machine.fada('models', '--json', HF_HUB_OFFLINE='1').stdout)
    assert next(m for m in listed if m['name'] == 'ours')['here'] == 'tested fp32'
    assert {m['name'] for m in listed} == {*MODELS, 'ours'} and all('fits' in m for m in listed)


def test_a_broken_download_goes_on_where_it_stopped(machine):
    machine.stop_after = 4096
    r = machine.fada('models', 'get', 'ours')
    assert r.returncode == 1
    assert 'run the same command again' in r.stderr and 'Traceback' not in r.stderr
    machine.stop_after = None
    machine.requests.clear()
    r = machine.fada('models', 'get', 'ours')
    assert r.returncode == 0, r.stderr
    asked = [r for _, path, r in machine.requests if '/resolve/' in path and '.safetensors' in path]
    assert asked[0] == 'bytes=4096-'  # the first shard goes on, the others are new


def test_what_the_hub_refuses_says_what_to_do(machine):
    machine.gated.add('group/tiny')
    r = machine.fada('models', 'get', 'ours')
    assert r.returncode == 1 and 'accept the licence at' in r.stderr and 'HF_TOKEN' in r.stderr
    assert json.loads(machine.fada('models', 'access', 'ours', '--json').stdout)['granted'] is False
    r = machine.fada('models', 'get', 'ours', HF_TOKEN='hf_good')
    assert r.returncode == 0 and 'hf_good' not in r.stderr + r.stdout
    row = '[ours]\nlike = smolvlm-256m\ncheckpoint = group/tiny\nrevision = v9\n'
    (machine.folder / 'models.ini').write_text(row)
    r = machine.fada('models', 'get', 'ours', HF_TOKEN='hf_good')
    assert r.returncode == 1 and 'no revision v9' in r.stderr
    (machine.folder / 'models.ini').write_text('[ours]\nlike = smolvlm-256m\ncheckpoint = group/none\n')
    r = machine.fada('models', 'get', 'ours')
    assert r.returncode == 1 and 'no such repository' in r.stderr


def _one_sentence(r, *words):
    "The error of a command that failed: one line, no traceback, with `words`"
    lines = r.stderr.strip().splitlines()
    assert r.returncode == 1 and len(lines) == 1 and lines[0].startswith('error: '), r.stderr
    assert all(w in lines[0] for w in words), lines[0]


def test_a_row_whose_pin_or_checkpoint_changed(machine, monkeypatch):
    "What is here is not used for a row that now names another revision or another repository"
    from fada.checkpoints import base_identity, locate
    from fada.registry import model_spec

    ini = machine.folder / 'models.ini'
    row = ini.read_text()
    assert machine.fada('models', 'get', 'ours', '--quiet').returncode == 0
    monkeypatch.chdir(machine.folder)
    monkeypatch.setenv('XDG_DATA_HOME', str(machine.folder / 'state'))
    assert locate(model_spec('ours')) and base_identity(model_spec('ours')) == f'group/tiny@{machine.commit}'
    ini.write_text(row + 'revision = bada55bada55bada\n')
    with pytest.raises(
        FadaError, match='revision c0ffee000000 is here.*bada55bada55, as the row pins.*fada models get ours'
    ):
        locate(model_spec('ours'))
    ini.write_text(row.replace('group/tiny', 'group/other'))
    with pytest.raises(FadaError, match='ours is not downloaded yet.*group/other'):
        locate(model_spec('ours'))


def test_unknown_names(machine):
    for words in (('models', 'get', 'smolvlm-255m'), ('evaluate', '--model', 'smolvlm-255m')):
        _one_sentence(machine.fada(*words), "unknown model 'smolvlm-255m'", 'did you mean', 'smolvlm-256m')


def test_half_of_a_checkpoint_in_the_cache(machine, checkpoint, tmp_path):
    "Another tool's download that broke off: configuration there, a shard missing"
    cache = tmp_path / 'hf' / 'hub' / 'models--group--tiny'
    snapshot = cache / 'snapshots' / machine.commit
    shutil.copytree(checkpoint, snapshot)
    (cache / 'refs').mkdir()
    (cache / 'refs' / 'main').write_text(machine.commit)
    shards(snapshot)[1].unlink()
    r = machine.fada('models', 'test', 'ours', '--precision', 'fp32', HF_HUB_OFFLINE='1')
    _one_sentence(r, 'shards are missing', 'download it again: `fada models get`')
    assert machine.fada('models', 'get', 'ours', '--quiet').returncode == 0  # and then it is whole
    assert json.loads(machine.fada('models', 'access', 'ours', '--json').stdout)['downloaded'] is True


def test_no_network_and_a_damaged_file(machine):
    shard = next(p.name for p in (machine.folder / 'repo').glob('*.safetensors'))
    machine.damage = shard
    r = machine.fada('models', 'get', 'ours')
    assert r.returncode == 1 and 'a damaged download' in r.stderr
    machine.damage = None
    assert machine.fada('models', 'get', 'ours').returncode == 0  # the damaged copy was not kept
    r = machine.fada('models', 'get', 'ours', HF_ENDPOINT='http://127.0.0.1:9')
    assert r.returncode == 1
    assert 'the hub cannot be reached' in r.stderr and len(r.stderr.strip().splitlines()) == 1
    r = machine.fada('models', 'get', 'ours', HF_HUB_OFFLINE='1')
    assert r.returncode == 1 and 'downloads are switched off' in r.stderr


def _load(folder, **kw):
    return load_model(MODELS['smolvlm-256m'], folder, device='cpu', **kw)


def test_the_copy_itself_loads(copy):
    assert _load(copy)[0] is not None


def test_shard_cut_short_or_garbled(copy):
    shard = shards(copy)[0]
    whole = shard.read_bytes()
    for broken, why in (
        (whole[: len(whole) // 2], 'its header promises'),
        (whole[:5], '5 bytes'),
        (struct.pack('<Q', 10**12) + whole[8:], 'does not fit'),
        (whole[:8] + b'!' * 50 + whole[58:], 'not readable'),
    ):
        shard.write_bytes(broken)
        with pytest.raises(FadaError, match=why):
            _load(copy)


def test_shard_missing(copy):
    shards(copy)[0].unlink()
    with pytest.raises(FadaError, match='shards are missing'):
        _load(copy)


def test_pickle_alone(copy):
    for p in copy.glob('model*'):
        p.unlink()
    (copy / 'pytorch_model.bin').write_bytes(b'x')
    with pytest.raises(FadaError, match='pickle weights'):
        _load(copy)


@pytest.mark.parametrize('name', ['config.json', 'processor_config.json', 'tokenizer_config.json'])
def test_remote_code_in_any_configuration(copy, name):
    config = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(dict(config, auto_map={'AutoModel': 'own.Own'})))
    with pytest.raises(FadaError, match=f'run code of its own.*{name}'):
        _load(copy)


def test_missing_and_left_over_weights(copy):
    from safetensors.torch import load_file, save_file

    shard = shards(copy)[-1]
    w = load_file(shard)
    index = json.loads((copy / 'model.safetensors.index.json').read_text())
    name = next(n for n in w if 'text_model' in n or 'lm_head' in n)
    renamed = {('model.stray.weight' if k == name else k): v for k, v in w.items()}
    save_file(renamed, shard, metadata={'format': 'pt'})
    with pytest.raises(FadaError, match='are in no shard'):
        _load(copy)
    index['weight_map']['model.stray.weight'] = index['weight_map'].pop(name)
    (copy / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(FadaError, match='did not load whole'):
        _load(copy)


def test_index_that_points_elsewhere(copy):
    f = copy / 'model.safetensors.index.json'
    index = json.loads(f.read_text())
    index['weight_map'] = {k: '../' + v for k, v in index['weight_map'].items()}
    f.write_text(json.dumps(index))
    with pytest.raises(FadaError, match='the index names'):
        _load(copy)


def _rewrite(folder, change):
    "The weights of `folder` as one file, passed through `change`"
    from safetensors.torch import load_file, save_file

    weights = {k: v for s in shards(folder) for k, v in load_file(s).items()}
    for p in folder.glob('model*'):
        p.unlink()
    save_file(change(weights), folder / 'model.safetensors', metadata={'format': 'pt'})


def test_counters_of_earlier_releases_are_no_weights(copy):
    import torch

    _rewrite(copy, lambda w: {**w, 'model.vision_model.embeddings.position_ids': torch.arange(16)[None]})
    assert _load(copy)[0] is not None


@pytest.mark.parametrize('architecture', ['llava', 'gemma3', 'gemma3-text', 'paligemma'])
def test_names_as_published(architecture, tmp_path):
    "The hub's checkpoints were written by earlier releases, whose vision towers lie one level deeper"
    import torch

    name, _, folder = tiny(architecture, tmp_path)
    before = load_model(MODELS[name], folder, device='cpu')[0]
    deep = lambda k: re.sub(r'^vision_tower\.(?!vision_model)', 'vision_tower.vision_model.', k)
    _rewrite(folder, lambda w: {deep(k): v for k, v in w.items()})
    after = load_model(MODELS[name], folder, device='cpu')[0]
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_another_architecture(copy):
    with pytest.raises(FadaError, match="type 'smolvlm'"):
        load_model(MODELS['llava-1.5-7b'], copy, device='cpu')


def test_wrong_number_of_image_tokens(tmp_path):
    folder = tiny('blip2-opt', tmp_path)[2]
    f = folder / 'processor_config.json'
    f.write_text(json.dumps(dict(json.loads(f.read_text()), num_query_tokens=2)))
    with pytest.raises(FadaError, match='makes 2 image tokens'):
        load('blip2-opt-2.7b', weights=folder, device='cpu')


def test_out_of_memory_names_what_fits(copy, tmp_path):
    "A checkpoint too large for any machine: its headers alone say so"
    huge = tmp_path / 'huge'
    shutil.copytree(copy, huge)
    for p in huge.glob('model*'):
        p.unlink()
    n = 2**42
    head = json.dumps({'w': dict(dtype='F16', shape=[n // 2], data_offsets=[0, n])}).encode()
    with open(huge / 'model.safetensors', 'wb') as f:
        f.write(struct.pack('<Q', len(head)) + head)
        try:
            f.truncate(8 + len(head) + n)
        except OSError:
            pytest.skip('this file system holds no sparse file of that size')
    with pytest.raises(FadaError, match='needs about .* GiB and cpu has .* a model that fits'):
        _load(huge)


@pytest.mark.skipif(sys.platform != 'linux', reason='a limit on address space')
def test_memory_that_runs_out_while_loading(copy):
    "A process that may take little more memory than it has: the same sentence, and no traceback"
    code = f"""
import resource, sys
from pathlib import Path
from fada.checkpoints import load_model
from fada.registry import MODELS
from fada.settings import FadaError
load_model(MODELS['smolvlm-256m'], {str(copy)!r}, device='cpu')
used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used+200_000,)*2)
try: load_model(MODELS['smolvlm-256m'], {str(copy)!r}, device='cpu')
except FadaError as e: print(e)
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'needs about' in r.stdout and 'a model that fits' in r.stdout, r.stdout + r.stderr[-500:]


def test_device_and_precision_are_pinned(copy):
    for bad in ('gpu', 'cuda:x', 'mps2'):
        with pytest.raises(FadaError, match='unknown device'):
            resolve_device(bad)
    half = replace(MODELS['smolvlm-256m'], precisions=('fp32', 'bf16'))
    with pytest.raises(FadaError, match='does not run in fp16.*one of fp32, bf16'):
        load_model(half, copy, 'fp16', 'cpu')
    assert {str(p.device) for p in _load(copy)[0].parameters()} == {'cpu'}


def test_adapter_of_another_base(copy, tmp_path, small_data, monkeypatch):
    from fada.finetune import finetune

    base = load('smolvlm-256m', weights=copy, device='cpu', precision='fp32', max_new_tokens=4)
    finetune(
        base,
        small_data,
        ['Femur'],
        tmp_path / 'adapter',
        rank=2,
        steps=1,
        batch=1,
        images=2,
        checks=1,
        validation_images=1,
        skip_preflight=True,
    )
    other = tiny('smolvlm', tmp_path, seed=1)[2]
    with pytest.raises(FadaError, match='trained on another base'):
        load('smolvlm-256m', tmp_path / 'adapter', other, 'fp32', 'cpu')
    from fada.vlm import attach

    plain = load('smolvlm-256m', weights=copy, device='cpu', precision='fp32')
    weights = tmp_path / 'adapter' / 'adapter_model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FadaError, match='a damaged shard.*adapter_model'):
        attach(plain, tmp_path / 'adapter')
    weights.rename(weights.with_suffix('.bin'))
    with pytest.raises(FadaError, match='no adapter weights'):
        attach(plain, tmp_path / 'adapter')
    with pytest.raises(FadaError, match='nowhere'):
        attach(plain, tmp_path / 'nowhere')


def test_a_row_that_is_not_here_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path))
    for name in ('florence-2-large', 'blip2-medgemma-4b'):
        with pytest.raises(FadaError, match=f'fada models get {name}'):
            load(name, device='cpu')
