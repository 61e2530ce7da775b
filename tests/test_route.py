"""Adapters of several categories on one base: the same answers as loaded alone, and a flag for what none of them
knows."""

import json, subprocess
import numpy as np
import pytest
from PIL import Image, ImageOps
from commands import typed
from fada.card import write_card
from fada.data import load_table, read_image
from fada.finetune import finetune
from fada.route import FILE, Router, adapters_below, load_likeness
from fada.settings import FadaError
from fada.vlm import UNLIKE, load


def nano(adapter=None):
    return load('blip2-nano', adapter, device='cpu', precision='fp32', max_new_tokens=16)


@pytest.fixture(scope='module')
def run(small_data, tmp_path_factory):
    "Two adapters below one folder, moved a little so that they say something else than the base"
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp('run')
    for k, c in enumerate(('Femur', 'Abdomen')):
        out = folder / f'lora-{c}' / 'adapter'
        finetune(nano(), small_data, [c], out, steps=4, batch=8, checks=1, validation_images=4, skip_preflight=True)
        g = torch.Generator().manual_seed(k)
        at = out / 'adapter_model.safetensors'
        save_file(
            {n: t + torch.randn(t.shape, generator=g) * 0.05 for n, t in load_file(at).items()}, at, dict(format='pt')
        )
    return folder


@pytest.fixture(scope='module')
def pictures(small_data):
    t = load_table(small_data, split='test').drop_duplicates('image')
    return [(read_image(small_data / i), c) for i, c in zip(t.image, t.category)]


def said(answers):
    return [(a.text, round(a.confidence, 4)) for a in answers]


def test_switched_adapters_answer_as_loaded_alone(run, pictures):
    image = pictures[0][0]
    router = Router(nano(), adapters_below(run))
    base = said(nano().ask(image))
    alone = {c: nano(run / f'lora-{c}') for c in ('Femur', 'Abdomen')}
    for name in ('Femur', 'Abdomen', 'base', 'Femur'):
        router.use(name)
        got = router.vlm.ask(image)
        assert said(got) == (base if name == 'base' else said(alone[name].ask(image))), name
        assert router.vlm.identity()['adapter'] == (None if name == 'base' else alone[name].adapter)
    assert said(alone['Femur'].ask(image)) != base
    with pytest.raises(FadaError, match="no adapter 'Thorax'"):
        router.use('Thorax')


def test_where_an_image_goes(run, pictures):
    "Told, proposed, unknown to all: each says so"
    router = Router(nano(), adapters_below(run))
    a = router.ask(pictures[0][0], [1, 6], 'Femur')
    assert [x.more['route']['why'] for x in a] == ['told'] * 2
    r = router.route(pictures[0][0], 'Thorax')
    assert (r.adapter, r.category) == ('base', 'Thorax') and 'no adapter for Thorax: answered by the base' in r.why
    found = [(router.route(i), c) for i, c in pictures]
    assert np.mean([r.adapter == c for r, c in found]) > 0.7, [(r.adapter, c) for r, c in found]
    strange = router.route(ImageOps.invert(pictures[0][0].convert('RGB')))
    assert strange.adapter == 'base' and 'unlike the training images of every adapter' in strange.why


def test_answers_about_a_stranger_carry_a_flag(run, pictures):
    vlm = nano(run / 'lora-Femur')
    femora = [i for i, c in pictures if c == 'Femur']
    assert np.mean([UNLIKE in vlm.ask(i, 1).flags for i in femora]) < 0.5
    for strange in (
        ImageOps.invert(femora[0].convert('RGB')),
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8)),
    ):
        assert UNLIKE in vlm.ask(strange, 1).flags and UNLIKE not in nano().ask(strange, 1).flags


def test_command_line(run, pictures, tmp_path):
    ImageOps.invert(pictures[0][0].convert('RGB')).save(tmp_path / 'strange.png')
    pictures[0][0].save(tmp_path / 'known.png')
    ask = lambda *w: (
        subprocess.run(
            [*typed('ask'), *w, '--quiet'],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        ).stdout
    )
    out = json.loads(
        ask(
            'known.png',
            'plane',
            '--model',
            'blip2-nano',
            '--adapters',
            str(run),
            '--category',
            pictures[0][1],
            '--json',
        )
    )
    assert out['answers'][0]['more']['route']['adapter'] == pictures[0][1]
    assert 'do not rely on what it says' in ask(
        'strange.png', 'plane', '--model', 'blip2-nano', '--adapter', str(run / 'lora-Femur')
    )


def test_damaged_or_missing_features(run, tmp_path):
    import shutil

    d = tmp_path / 'a'
    shutil.copytree(run / 'lora-Femur' / 'adapter', d)
    (d / FILE).write_bytes((d / FILE).read_bytes()[:100])
    with pytest.raises(FadaError, match='damaged features'):
        nano(d)
    (d / FILE).unlink()
    assert nano(d).likeness is None and load_likeness(d) is None
    with pytest.raises(FadaError, match='no adapters'):
        adapters_below(tmp_path / 'none')


def test_card_with_scores_and_controls(run, small_data, tmp_path):
    from fada.evaluate import evaluate

    evaluate(nano(run / 'lora-Femur'), small_data, tmp_path / 'job', ['Femur'], control_images=4)
    page = write_card(run / 'lora-Femur', tmp_path / 'job').read_text()
    assert (
        'shuffled same' in page
        and 'Not a medical device' in page
        and '| rank | 8 |' in page
        and 'Not evaluated' not in page
    )
    with pytest.raises(FadaError, match='an evaluation of another adapter'):
        write_card(run / 'lora-Abdomen', tmp_path / 'job')
