"""Every architecture of the registry with random weights, through the loader, engine and training of the real
ones: it answers, learns a step, keeps its adapter bit for bit, merges, and runs quantised. The table of
ticks is read from here."""

import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from PIL import Image
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny import BUILD, row, tiny
from fada.canary import probe_picture
from fada.settings import FadaError
from fada.vlm import Request, load, merge

ARCHITECTURES = list(BUILD)
SEES = [a for a in ARCHITECTURES if a != 'gemma3-text']


def quick(*names):
    """All architectures, the others than `names` marked slow: `make test` takes one of each engine, ticks.py
    takes all"""
    return [a if a in names else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]


PLAIN = 'Which plane is it?'
LONG = 'Which structures are seen, and how good is the quality of this image, in a few words?'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('tiny')


def open_tiny(architecture, folder, **kw):
    "The real loader on a tiny checkpoint"
    name, _, weights = tiny(architecture, folder)
    return load(name, weights=weights, device='cpu', max_new_tokens=5, **{'precision': 'fp32', **kw})


def picture(architecture, seed=0):
    if architecture == 'gemma3-text':
        return None
    return (
        probe_picture() if not seed else np.random.default_rng(seed).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_answer(architecture, folder):
    """Answers do not depend on what else is asked beside them; a question without an image is answered,
    identity is complete"""
    vlm = open_tiny(architecture, folder)
    images = [picture(architecture), picture(architecture, 1)]
    together = list(vlm.answer([Request(i, [PLAIN, LONG], k) for k, i in enumerate(images)]))
    alone = [vlm.ask(i, q) for i in images for q in (PLAIN, LONG)]
    assert [a.error for a in together + alone] == [''] * 8
    assert [a.text for a in together] == [a.text for a in alone]
    assert np.allclose([a.confidence for a in together], [a.confidence for a in alone], atol=1e-5)
    assert all(0 < a.confidence <= 1 for a in together) and [a.id for a in together] == [0, 0, 1, 1]
    assert not vlm.ask(None, PLAIN).error
    identity = vlm.identity()
    assert identity['model'] == vlm.spec.name and identity['base'] and identity['prompt'] == vlm.spec.prompt
    assert identity == open_tiny(architecture, folder).identity()


@pytest.mark.parametrize('architecture', SEES)
def test_answer_looks_at_the_image(architecture, folder):
    "Another image, or none, moves the probability of the answer"
    vlm = open_tiny(architecture, folder)
    c = [vlm.ask(i, PLAIN).confidence for i in (picture(architecture), picture(architecture, 1), None)]
    assert len(set(c)) == 3


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_train_save_merge(architecture, folder, small_data, tmp_path, monkeypatch):
    """A LoRA step through fada.train lowers the loss; the adapter comes back bit for bit, answers with it
    are equal, merging too"""
    from safetensors.torch import load_file
    import torch
    from fada.finetune import finetune

    vlm = open_tiny(architecture, folder)
    out = tmp_path / 'adapter'
    frozen = {n: p.clone() for n, p in vlm.core.named_parameters()}
    about = finetune(
        vlm, small_data, ['Femur'], out, rank=2, lr=5e-3, steps=3, batch=2, images=4, checks=1, validation_images=1
    )
    assert np.isfinite([l for _, l in about['losses']]).all() and sum(about['trainable'].values()) > 0
    assert set(about['trainable']) <= {'qformer', 'language_model'} | (
        {'projection'} if vlm.spec.trained_parts else set()
    )
    for n, p in vlm.core.named_parameters():  # nothing but adapter layers and declared parts has moved
        plain = n.replace('.base_layer', '').replace('.original_module', '')
        if plain in frozen and p.shape == frozen[plain].shape and not any(t in n for t in vlm.spec.trained_parts):
            assert torch.equal(p, frozen[plain]), n
    again = open_tiny(architecture, folder, adapter=out)
    kept = load_file(out / 'adapter_model.safetensors')
    now = {n.replace('.default', ''): p for n, p in again.model.named_parameters()}
    assert kept and all(torch.equal(p, now[n]) for n, p in kept.items() if n in now) and any(n in now for n in kept)
    a, b = (v.ask(picture(architecture), [PLAIN, LONG]) for v in (vlm, again))
    assert [x.text for x in a] == [x.text for x in b] and [x.confidence for x in a] == [x.confidence for x in b]
    assert again.identity()['adapter'] == vlm.identity()['adapter']
    merge(again, tmp_path / 'merged')
    c = again.ask(picture(architecture), [PLAIN, LONG])
    assert not any(x.error for x in c) and np.allclose(
        [x.confidence for x in b], [x.confidence for x in c], atol=1e-5
    )


@pytest.mark.parametrize('architecture', quick('blip2-t5', 'instructblip-llama', 'gemma3', 'qwen3-vl', 'florence2'))
def test_a_step_learns(architecture, folder):
    """Six steps on two questions lower its loss by a tenth at least: the labels are on the answer and the
    gradient arrives"""
    import torch
    from functools import partial
    from fada import train

    vlm = open_tiny(architecture, folder)
    with torch.no_grad():
        features = train.training_inputs_of(vlm, [picture(architecture)])
    train.add_lora(vlm, 4)
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    loss = vlm.loss or partial(train.decoder_loss, vlm.core, vlm.processor.tokenizer)
    opt = torch.optim.AdamW(parameters, lr=3e-2)
    seen = []
    for _ in range(6):
        l = loss(features, [[(PLAIN, 'axial plane'), (LONG, 'femur')]])
        opt.zero_grad()
        l.backward()
        opt.step()
        seen.append(float(l.detach()))
    assert seen[-1] < 0.9 * seen[0], seen


@pytest.mark.parametrize('architecture', [a for a in ARCHITECTURES if 'attention' in row(a).capabilities])
def test_relevancy(architecture, folder):
    "A map of the answer over the patches: finite, not negative, not empty, and another one for another image"
    from fada.attention import relevancy

    vlm = open_tiny(architecture, folder)
    maps = []
    for seed in (0, 1):
        heat, per, tokens = relevancy(vlm, picture(architecture, seed), PLAIN, 'axial plane')
        assert heat.ndim == 2 and heat.size >= 2 and len(per) == len(tokens) and np.isfinite(heat).all()
        assert (heat >= 0).all() and heat.max() > 0
        maps.append(heat)
    assert not np.allclose(*maps)


@pytest.mark.parametrize('architecture', ['llava', 'gemma3', 'paligemma', 'qwen3-vl', 'florence2', 'blip2-t5'])
def test_captured_attention_is_the_models_own(architecture, folder):
    "Logits with attention caught equal those without: no mask, bias, cap or scale was forgotten"
    import torch
    from fada.attention import captured
    from fada.families import answer_labels

    vlm = open_tiny(architecture, folder)
    t = vlm.processor(
        images=[[Image.fromarray(picture(architecture))]]
        if architecture != 'florence2'
        else [Image.fromarray(picture(architecture))],
        text=[vlm.render(PLAIN, True)[0]] if hasattr(vlm, 'render') else [PLAIN],
        return_tensors='pt',
    )
    if architecture in ('florence2', 'blip2-t5'):
        t['labels'] = answer_labels(vlm.processor.tokenizer, ['axial'])
    with torch.no_grad():
        plain = vlm.core(**t).logits
        with captured(vlm.core) as caught:
            got = vlm.core(**t).logits
            assert caught
        assert torch.allclose(plain, got, atol=1e-4) and torch.allclose(vlm.core(**t).logits, plain, atol=1e-6)


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
@pytest.mark.parametrize('architecture', quick('blip2-opt', 'instructblip-t5', 'internvl'))
def test_half_precision(architecture, precision, folder):
    "Answers in a half type; parts that the row keeps in fp32 are in fp32 under fp16"
    import re, torch

    vlm = open_tiny(architecture, folder, precision=precision)
    assert not vlm.ask(picture(architecture), PLAIN).error
    want = dict(bf16=torch.bfloat16, fp16=torch.float16)[precision]
    kinds = {n: p.dtype for n, p in vlm.core.named_parameters()}
    assert want in kinds.values()
    if precision == 'fp16':
        for part in vlm.spec.fp32_parts:
            assert {d for n, d in kinds.items() if re.search(rf'(^|\.){part}(\.|$)', n)} == {torch.float32}


@pytest.mark.parametrize('precision', ['int8', 'nf4'])
@pytest.mark.parametrize('architecture', quick('blip2-opt', 'llava', 'florence2'))
def test_quantised(architecture, precision, folder):
    "Quantised on the CPU: the canary finds it close to fp32, it answers, and a LoRA step learns on top"
    import torch
    from functools import partial
    from fada import train

    vlm = open_tiny(architecture, folder, precision=precision)
    assert vlm.canary['reference'] == 'fp32' and vlm.canary['cosine'] > (0.98 if precision == 'int8' else 0.8)
    assert any(type(m).__name__ in ('Linear8bitLt', 'Linear4bit') for m in vlm.core.modules())
    assert not vlm.ask(picture(architecture), PLAIN).error
    with torch.no_grad():
        features = train.training_inputs_of(vlm, [picture(architecture)])
    train.add_lora(vlm, 2)
    vlm.model.train()
    loss = vlm.loss or partial(train.decoder_loss, vlm.core, vlm.processor.tokenizer)
    l = loss(features, [[(PLAIN, 'axial')]])
    l.backward()
    assert torch.isfinite(l) and any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in vlm.model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize('architecture', ['smolvlm', 'internvl'])
def test_tiles(architecture, folder, monkeypatch):
    """A row with `tiles` cuts an image into that many at most and counts their tokens; answers do not depend on
    neighbours with other tiles, the map covers the picture, and a step of training takes them"""
    import torch
    from fada import registry, train
    from fada.attention import relevancy

    name = row(architecture).name
    monkeypatch.setitem(registry.MODELS, name, replace(registry.MODELS[name], tiles=5))
    vlm = open_tiny(architecture, folder)
    square = Image.fromarray(probe_picture())
    wide = square.resize((160, 80))
    tokens = lambda v, im: v.count_image_tokens(v.inputs([im], [v.render(PLAIN, True)[0]]))[0]
    assert [tokens(vlm, im) // 4 for im in (square, wide)] == [2 * 2 + 1, 1 * 2 + 1] and vlm.identity()['tiles'] == 5
    together = list(vlm.answer([Request(im, [PLAIN, LONG]) for im in (square, wide)]))
    alone = [vlm.ask(im, q) for im in (square, wide) for q in (PLAIN, LONG)]
    assert [(a.text, a.error) for a in together] == [(a.text, '') for a in alone]
    assert np.allclose([a.confidence for a in together], [a.confidence for a in alone], atol=1e-5)
    assert [relevancy(vlm, im, PLAIN, 'axial')[0].shape for im in (square, wide)] == [(4, 4), (2, 4)]
    train.add_lora(vlm, 2)
    loss = vlm.loss([square, wide], [[(PLAIN, 'axial plane')], [(LONG, 'femur')]])
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in vlm.model.parameters())
    t = vlm.inputs([square], [vlm.render(PLAIN, True)[0]])
    lost = dict(t, input_ids=t['input_ids'][:, :-20])
    with pytest.raises(FadaError, match='image tokens for 5 tiles'):
        vlm.count_image_tokens(lost)
    monkeypatch.setitem(registry.MODELS, name, replace(registry.MODELS[name], tiles=1))
    one = open_tiny(architecture, folder)
    assert tokens(one, square) == 4 and 'tiles' not in one.identity()


def test_tiles_go_back_to_their_place():
    "One token of one tile lights its own corner; one of the whole image is spread over the place it stands for"
    import torch
    from fada.families import untile

    # last tile, last token; whole, first token
    rows = torch.zeros(2, (2 * 3 + 1) * 4)
    rows[0, 5 * 4 + 3] = 1
    rows[1, 6 * 4] = 1
    maps = untile(rows, (2, 3))
    assert maps.shape == (2, 4, 6) and torch.allclose(maps.sum((1, 2)), torch.ones(2))
    assert maps[0, 3, 5] == 1 and torch.allclose(maps[1, :2, :3], torch.full((2, 3), 1 / 6))


def test_florence_says_places_in_words(folder):
    "Boxes and outlines of its task prompts, from a grid of 1,000 to pixels; a free question keeps none"
    vlm = open_tiny('florence2', folder)
    im = Image.new('RGB', (200, 100))
    at = lambda *n: ''.join(f'<loc_{i}>' for i in n)
    box = at(100, 200, 300, 400)
    for task, text, says in (
        ('<OD>', f'stomach{box}spine{at(0, 0, 999, 999)}', 'stomach [20, 20, 60, 40]; spine [0, 0, 199, 99]'),
        ('<REGION_PROPOSAL>', box, '[20, 20, 60, 40]'),
        ('<CAPTION_TO_PHRASE_GROUNDING>the stomach', f'stomach{box}', 'stomach [20, 20, 60, 40]'),
        ('<OCR_WITH_REGION>', f'BPD 52{box}{at(300, 400, 100, 400)}', 'BPD 52 [20, 20, 60, 40, 60, 40, 20, 40]'),
        ('<CAPTION>', 'a femur', 'a femur'),
        (PLAIN, f'a femur{box}', 'a femur'),
    ):
        assert vlm.in_words(text, task, im) == says, task
    assert not any(a.error for a in vlm.ask(im, ['<OD>', '<DETAILED_CAPTION>', PLAIN]))


def test_the_canary_stops_what_fell_silent(folder, monkeypatch):
    """Without memory for a reference: no number, no word, and one word to every question are each refused; with
    one, so is drift"""
    import torch
    from fada.canary import check_canary

    vlm = open_tiny('llava', folder, precision='nf4')
    head = vlm.core.get_output_embeddings()
    weight = head.weight.detach().clone()
    big = weight.abs().sum() * 100

    def check(change):
        with torch.no_grad():
            head.weight.copy_(weight)
            change(head.weight)
        return check_canary(vlm, tiny('llava', folder)[2])

    def always(token):  # this token's logit is far above all others, whatever the hidden state
        def change(w):
            hidden = []
            hook = head.register_forward_pre_hook(lambda m, args: hidden.append(args[0][:, -1].mean(0)))
            vlm.ask(probe_picture(), PLAIN)
            hook.remove()
            w.zero_()
            w[token] = torch.stack(hidden).mean(0) * big

        return change

    with pytest.raises(FadaError, match='logits diverge from fp32'):
        check(lambda w: w.neg_())
    monkeypatch.setattr('fada.canary.free_bytes', lambda device: 0)
    assert check(lambda w: None)['reference'] is None
    with pytest.raises(FadaError, match='no numbers'):
        check(lambda w: w.fill_(float('nan')))
    with pytest.raises(FadaError, match='every answer is empty'):
        check(always(vlm.tokenizer.eos_token_id))
    with pytest.raises(FadaError, match='the same answer to every question'):
        check(always(100))


def test_composed_from_two_checkpoints_on_disk(tmp_path, monkeypatch, small_data):
    """`fada models get blip2-medgemma-4b` on tiny checkpoints of both parts: joined, saved, loaded whole,
    answering; its new projection learns before LoRA does"""
    import torch
    from fada.checkpoints import record
    from fada.compose import get_model
    from fada.finetune import finetune
    from fada.loop import Fit
    from fada.registry import MODELS

    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path / 'state'))
    parts = {
        n: tiny(a, tmp_path)[2] for n, a in (('blip2-opt-2.7b', 'blip2-opt'), ('medgemma-4b-text', 'gemma3-text'))
    }
    for n, where in parts.items():
        record(n, checkpoint=MODELS[n].checkpoint, revision='0' * 40, folder=str(where))
    about = get_model(MODELS['blip2-medgemma-4b'], say=lambda line: None)
    assert about['parts']['language'] == 'google/medgemma-4b-it'
    vlm = load('blip2-medgemma-4b', precision='fp32', device='cpu', max_new_tokens=4)
    eyes, words = (load(n, precision='fp32', device='cpu') for n in parts)
    for mine, theirs in (
        (vlm.core.vision_model, eyes.core.vision_model),
        (vlm.core.qformer, eyes.core.qformer),
        (vlm.core.language_model, words.core),
    ):  # in bf16 on disk
        assert all(
            torch.equal(a, b.bfloat16().float()) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
        )
    seen = []
    real = Fit.begin
    monkeypatch.setattr(
        Fit,
        'begin',
        lambda self, parameters, steps: (
            seen.append([n for n, p in vlm.model.named_parameters() if any(p is q for q in parameters)])
            or real(self, parameters, steps)
        ),
    )
    about = finetune(
        vlm,
        small_data,
        ['Femur'],
        tmp_path / 'adapter',
        rank=2,
        lr=5e-3,
        steps=2,
        batch=2,
        images=4,
        checks=1,
        validation_images=1,
    )
    assert all('language_projection' in n for n in seen[0]) and any('lora_' in n for n in seen[1])
    assert set(about['trainable']) == {'projection', 'qformer', 'language_model'}


def test_memory_that_runs_out_in_training(folder, small_data, tmp_path, monkeypatch):
    "A card's own exception, which cannot be had here, becomes a sentence that says what to lower"
    import torch
    from fada.finetune import finetune
    from fada.loop import Material

    vlm = open_tiny('smolvlm', folder)

    def full(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    monkeypatch.setattr(Material, 'loss', full)
    with pytest.raises(FadaError, match='memory ran out with 2 images a step.*lower the batch'):
        finetune(vlm, small_data, ['Femur'], tmp_path / 'a', rank=2, steps=1, batch=2, images=4, validation_images=1)


def test_what_a_model_lacks_names_one_that_has_it(folder):
    """An image for the text model, a merge without an adapter or into quantised weights, a remote row: an
    error each, with a way out"""
    text = open_tiny('gemma3-text', folder)
    said = text.ask(picture('llava'), PLAIN)
    assert 'sees no image' in said.error and said.stage == 'encode'
    with pytest.raises(FadaError, match='no adapter to merge'):
        merge(text)
    for name, said in (
        ('openai', r'\[remote\] allowed'),
        ('anthropic', r'\[remote\] allowed'),
        ('ensemble', 'without parts'),
        ('plane-classifier', 'answers no questions'),
    ):
        with pytest.raises(FadaError, match=said):
            load(name)


def test_dispatch_of_unknown_names():
    with pytest.raises(FadaError, match='did you mean .*qwen3-vl-2b'):
        load('qwen3vl-2b')
