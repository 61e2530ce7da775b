"""On a card: what the CPU tests show, once more where the work will be done. Every test needs one, and is skipped
elsewhere.

python -m pytest -q tests/test_cuda.py"""

import sys
from pathlib import Path
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_engine import PLAIN, QUESTIONS, pictures, same
from tiny import BUILD, tiny
from fada.memory import allocator_peak
from fada.vlm import build_prompt, load, reference_said

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a card')]
CHAT = ('llava', 'gemma3', 'qwen2.5-vl', 'internvl')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('cuda')


@pytest.fixture(autouse=True)
def exact():
    "Whole fp32, no TF32"
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(kept)


def on(device, architecture, folder, precision='fp32', tokens=8, seed=0):
    name, _, weights = tiny(architecture, folder, seed)
    return load(name, weights=weights, device=device, max_new_tokens=tokens, precision=precision)


def rows_of(architecture):
    "(images, image of each row, questions)"
    if architecture == 'gemma3-text':
        return [None], [0] * len(QUESTIONS), QUESTIONS
    images = pictures(architecture)
    return images, [n for n in range(len(images)) for _ in QUESTIONS], QUESTIONS * len(images)


@pytest.mark.parametrize('architecture', list(BUILD))
def test_same_tokens_as_the_loop(architecture, folder):
    "fp32: tokens and log-probabilities of the plain loop on the same card"
    vlm = on('cuda:0', architecture, folder)
    images, at, asked = rows_of(architecture)
    got = vlm.said(vlm.see(images), at, [build_prompt(vlm.spec, q) for q in asked])
    want = [reference_said(vlm, images[n], q) for n, q in zip(at, asked)]
    assert next(vlm.core.parameters()).is_cuda
    for g, w in zip(got, want):
        assert same(g, w), (g, w)


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'nf4'])
@pytest.mark.parametrize('architecture', ['blip2-opt', 'blip2-gemma3', *CHAT, 'qwen3-vl'])
def test_a_recorded_step(architecture, precision, folder, monkeypatch):
    "CUDA graphs: the step is recorded, and says what steps one by one say, also where rows leave unevenly"
    from fada import decode

    vlm = on('cuda:0', architecture, folder, precision, tokens=24)
    images = pictures(architecture)
    asked = [build_prompt(vlm.spec, q) for q in QUESTIONS * 2]
    at = [0, 0, 0, 2, 1, 1, 2, 0]
    most = [3, 24, 1, 12, 10, 7, 24, 24]
    made = []
    record = decode.Tape.record
    monkeypatch.setattr(decode.Tape, 'record', lambda self: made.append(record(self)) or made[-1])
    got = vlm.said(vlm.see(images), at, asked, most)
    assert made and all(made), dict(decode._unrecordable)
    monkeypatch.setattr(decode, 'worth_recording', lambda rows: False)
    want = vlm.said(vlm.see(images), at, asked, most)
    near = 1e-4 if precision == 'fp32' else 0.05
    for g, w in zip(got, want):
        n = next(
            (k for k, (a, b) in enumerate(zip(g[0], w[0])) if a != b), len(g[0])
        )  # halves of a number round: two tokens may be level
        assert np.allclose(g[1][:n], w[1][:n], atol=near) and (n == len(g[0]) or abs(g[1][n] - w[1][n]) < 2 * near)


def test_what_cannot_be_recorded(folder):
    "LLM.int8 looks at its numbers on the way: the steps go on one by one, and the reason is kept"
    from fada import decode

    vlm = on('cuda:0', 'blip2-opt', folder, 'int8', tokens=24)
    a = vlm.ask(pictures('blip2-opt')[0], PLAIN)
    assert not a.error and a.text
    assert not vlm.ask(pictures('blip2-opt')[1], PLAIN).error
    print(dict(decode._unrecordable))


@pytest.mark.parametrize('architecture', ['blip2-opt', 'blip2-t5', 'florence2', *CHAT])
def test_as_on_the_cpu(architecture, folder):
    "fp32: a card says what a CPU says, and as surely"
    images, at, asked = rows_of(architecture)
    said = []
    for device in ('cpu', 'cuda:0'):
        vlm = on(device, architecture, folder)
        said.append(vlm.said(vlm.see(images), at, [build_prompt(vlm.spec, q) for q in asked]))
    for g, w in zip(*said):
        assert same(g, w, 1e-3), (g, w)


@pytest.mark.parametrize('precision', ['bf16', 'int8', 'nf4'])
@pytest.mark.parametrize('architecture', ['blip2-opt', 'blip2-t5', 'llava', 'qwen2.5-vl'])
def test_small_precisions(architecture, precision, folder):
    "Loaded through the check of its weights, and near to what fp32 says of the first token"
    vlm = on('cuda:0', architecture, folder, precision)
    a = vlm.ask(pictures(architecture)[0], PLAIN)
    assert not a.error
    if precision != 'bf16':
        assert vlm.canary['reference'] == 'fp32' and vlm.canary['cosine'] > dict(int8=0.96, nf4=0.8)[precision]
    kinds = {type(m).__name__ for m in vlm.core.modules()}
    assert {'bf16': 'Linear', 'int8': 'Linear8bitLt', 'nf4': 'Linear4bit'}[precision] in kinds


def test_out_of_memory_halves(folder):
    "What a card cannot hold at once is asked in parts, with the same answers; the part is remembered"
    vlm = on('cuda:0', 'llava', folder, tokens=24)
    image = pictures('llava')[:1]
    asked = [build_prompt(vlm.spec, f'{k} {q}') for k in range(400) for q in QUESTIONS]
    seen = vlm.see(image)
    at = [0] * len(asked)
    few = vlm.said(seen, at[:8], asked[:8])
    with allocator_peak('cuda:0') as a:
        all_ = vlm.said(seen, at, asked)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    assert not vlm.budget
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + a['bytes'] * 0.3) / total)
    try:
        parts = vlm.said(seen, at, asked)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert vlm.budget
    for g, w in zip(parts, all_):
        assert same(g, w), (g, w)
    for g, w in zip(few, all_):
        assert same(g, w), (g, w)


@pytest.mark.parametrize(
    'architecture,precision',
    [
        ('blip2-opt', 'fp32'),
        ('blip2-opt', 'int8'),
        ('blip2-opt', 'nf4'),
        ('blip2-t5', 'nf4'),
        ('instructblip-llama', 'nf4'),
        ('blip2-gemma3', 'int8'),
        ('llava', 'nf4'),
        ('qwen2.5-vl', 'bf16'),
    ],
)
def test_training(architecture, precision, folder, small_data, tmp_path):
    """LoRA on a card, features kept where they can be, 8-bit paged optimiser and checkpointing: the loss falls, the
    adapter is read again"""
    from fada.data import load_table
    from fada.loop import Fit, LoraRecipe, Material
    from fada.train import add_lora

    vlm = on('cuda:0', architecture, folder, precision)
    add_lora(vlm, 8)
    table = load_table(small_data, split='train')
    table = table[table.image.isin(table.image.unique()[:8])]
    recipe = LoraRecipe(
        lr=1e-2,
        batch=4,
        optimiser='paged8bit' if precision != 'fp32' else 'adamw',
        checkpointing=precision == 'nf4',
        accumulate=2,
    )
    m = Material(vlm, small_data, table, recipe, tmp_path / 'f.npy')
    fit = Fit(vlm, recipe, m, m, '', tmp_path)
    vlm.core.train()
    _, parameters, _ = fit.phases()[-1]
    fit.begin(parameters, 30)
    with torch.no_grad():
        before = float(m.loss(range(len(m))))
    for fit.step in range(30):
        fit.take()
    with torch.no_grad():
        after = float(m.loss(range(len(m))))
    vlm.core.eval()
    assert np.isfinite(after) and after < before - 0.5, (
        before,
        after,
    )  # random weights: how far differs by architecture


def test_maps_as_on_the_cpu(folder):
    "Relevancy on a card is relevancy on a CPU"
    from fada.explain import explain

    for architecture, method in (('blip2-opt', 'relevancy'), ('llava', 'relevancy'), ('llava', 'occlusion')):
        maps = [
            explain(on(d, architecture, folder), pictures(architecture)[0], PLAIN, method) for d in ('cpu', 'cuda:0')
        ]
        a, b = (np.asarray((m[0] if isinstance(m, list) else m).heat, np.float64) for m in maps)
        assert np.allclose(a, b, atol=1e-3 * np.abs(a).max()), (architecture, method)


def test_end_to_end(small_data, tmp_path):
    "The nano: an adapter trained, scored and asked on a card, by the commands"
    import json
    import subprocess

    fada = lambda *a: subprocess.run(
        [sys.executable, '-m', 'fada.cli', *map(str, a), '--device', 'cuda', '--quiet'],
        capture_output=True,
        text=True,
    )
    r = fada('train', '--categories', 'Femur', '--data', small_data, '--out', tmp_path / 'a', '--steps', 20)
    assert not r.returncode, r.stderr[-2000:]
    r = fada(
        'evaluate',
        '--categories',
        'Femur',
        '--data',
        small_data,
        '--adapter',
        tmp_path / 'a',
        '--out',
        tmp_path / 'e',
    )
    assert not r.returncode, r.stderr[-2000:]
    assert json.loads((tmp_path / 'e' / 'metrics.json').read_text())
    r = fada('ask', next(small_data.rglob('*.png')), PLAIN, '--adapter', tmp_path / 'a', '--json')
    assert not r.returncode, r.stderr[-2000:]


def test_doctor_and_plan():
    "Both know the card by its own numbers"
    from fada.doctor import check_device, check_driver, check_free
    from fada.plan import plan
    from fada.settings import load_settings

    s = load_settings(device='cuda')
    assert [f.state for f in (check_driver(), check_device(s), check_free(s))] == ['ok'] * 3
    p = plan('blip2-opt-2.7b', 'answer', 'nf4', find=False)
    assert p.verdict == 'fits'
