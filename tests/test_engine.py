"""The engine against the plain loop: the same tokens, the same log-probabilities, for every family."""

import sys
from pathlib import Path
import numpy as np
from PIL import Image
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny import BUILD, tiny
from fada.canary import probe_picture
from fada.vlm import Request, build_prompt, load, reference_said

SHORT, PLAIN = 'Where?', 'Which standard plane is it?'
LONG = 'Which structures are seen, and how good is the quality of this image, in a few words: axial, sagittal or coronal?'
QUESTIONS = [SHORT, LONG, PLAIN, 'Is the femur seen?']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('engine')


def open_tiny(architecture, folder, seed=0, tokens=8):
    "The real loader on a tiny checkpoint"
    name, _, weights = tiny(architecture, folder, seed)
    return load(name, weights=weights, device='cpu', max_new_tokens=tokens, precision='fp32')


def pictures(architecture, n=3):
    "Pictures of several shapes; None for a model without eyes"
    if architecture == 'gemma3-text':
        return [None] * n
    rng = np.random.default_rng(1)
    sizes = [(224, 224), (120, 160), (200, 90), (64, 64)]
    return [
        Image.fromarray(probe_picture() if not k else rng.integers(0, 255, (*sizes[k % 4], 3), dtype=np.uint8))
        for k in range(n)
    ]


def same(got, want, tie=1e-4):
    """Whether an answer equals the reference's: ids, and log-probabilities to 1e-4. Ids may part only where the
    reference's best two lie within `tie`: there the log-probabilities of what each took agree to that"""
    n = next((k for k, (a, b) in enumerate(zip(got[0], want[0])) if a != b), None)
    if n is not None:
        return abs(got[1][n] - want[1][n]) < tie and np.allclose(got[1][:n], want[1][:n], atol=1e-4)
    return len(got[0]) == len(want[0]) and np.allclose(got[1], want[1], atol=1e-4)


@pytest.mark.parametrize('seed', [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))])
@pytest.mark.parametrize('architecture', list(BUILD))
def test_same_tokens_as_the_loop(architecture, seed, folder):
    "Three images of three shapes, questions of mixed length, one batch: tokens and log-probabilities of the loop"
    vlm = open_tiny(architecture, folder, seed)
    images = pictures(architecture)
    at = [n for n in range(len(images)) for _ in QUESTIONS]
    if architecture == 'gemma3-text':
        at = [0] * len(QUESTIONS)
        images = [None]
    asked = (QUESTIONS * len(images))[: len(at)]
    got = vlm.said(vlm.see(images), at, [build_prompt(vlm.spec, q) for q in asked])
    want = [reference_said(vlm, images[n], q) for n, q in zip(at, asked)]
    for g, w in zip(got, want):
        assert same(g, w), (g, w)
    assert len({tuple(np.round(w[1], 3)) for w in want}) > 1  # the questions and pictures matter


@pytest.mark.parametrize('architecture', ['blip2-opt', 'blip2-gemma3', 'llava', 'gemma3', 'qwen3-vl'])
def test_one_copy_of_a_prefix(architecture, folder):
    """Rows that attend together to the one copy of their prefix say what rows with copies say, also where they
    leave unevenly"""
    from fada import decode

    vlm = open_tiny(architecture, folder, tokens=10)
    images = pictures(architecture)
    at = [0, 0, 0, 2, 1, 1, 2, 0]
    asked = [build_prompt(vlm.spec, q) for q in (QUESTIONS * 2)]
    most = [3, 10, 1, 2, 10, 7, 10, 10]
    want = vlm.said(vlm.see(images), at, asked, most)
    kept = decode.SHARE_FROM
    try:
        decode.SHARE_FROM = 1
        got = vlm.said(vlm.see(images), at, asked, most)
    finally:
        decode.SHARE_FROM = kept
    assert [len(g[0]) for g in got] == most or vlm.words().ends
    for g, w in zip(got, want):
        assert same(g, w), (g, w)


@pytest.mark.parametrize('share_from', [1, 999])
@pytest.mark.parametrize('architecture', [a for a in BUILD if a not in ('blip2-t5', 'instructblip-t5', 'florence2')])
def test_a_step_of_fixed_size(architecture, share_from, folder, monkeypatch):
    """The step that a card records, all slots under a mask, says what growing slots say, also where rows leave
    unevenly"""
    from fada import decode

    vlm = open_tiny(architecture, folder, tokens=10)
    images = pictures(architecture)
    most = [3, 10, 1, 2, 10, 7, 10, 10]
    at = [0] * 8 if images[0] is None else [0, 0, 0, 2, 1, 1, 2, 0]
    asked = [build_prompt(vlm.spec, q) for q in QUESTIONS * 2]
    monkeypatch.setattr(decode, 'SHARE_FROM', share_from)
    seen = vlm.see(images)
    want = vlm.said(seen, at, asked, most)
    played = []
    monkeypatch.setattr(decode, 'worth_recording', lambda rows: not played.append(rows))
    got = vlm.said(seen, at, asked, most)
    assert played and [len(g[0]) for g in got] == [len(w[0]) for w in want]
    for g, w in zip(got, want):
        assert same(g, w), (g, w)


def test_who_listens_hears_every_step(folder, monkeypatch):
    "The check of a quantised model hooks the head: no step of it is recorded"
    from fada import decode

    asked = []
    monkeypatch.setattr(decode, 'worth_recording', lambda rows: asked.append(decode._by_hand.get()))
    name, _, weights = tiny('blip2-opt', folder)
    vlm = load(name, weights=weights, device='cpu', max_new_tokens=8, precision='int8')
    assert asked and all(asked) and vlm.canary
    asked.clear()
    vlm.ask(pictures('blip2-opt')[0], PLAIN)
    assert asked and not any(asked)


@pytest.mark.parametrize('share_from', [1, 999])
def test_an_opt_layer_by_layer(folder, monkeypatch, share_from):
    """An OPT's layers called one by one say what its own forward says, to the last digits; every other decoder goes
    through its own"""
    from fada import decode

    vlm = open_tiny('blip2-opt', folder, tokens=10)
    asked = [build_prompt(vlm.spec, q) for q in QUESTIONS * 2]
    seen = vlm.see(pictures('blip2-opt'))
    monkeypatch.setattr(decode, 'SHARE_FROM', share_from)
    at = [0, 0, 0, 2, 1, 1, 2, 0]
    decoder = vlm.words().decoder
    assert decode.is_plain_opt(decoder) and not decode.is_plain_opt(open_tiny('llava', folder).words().decoder)
    got = vlm.said(seen, at, asked)
    monkeypatch.setattr(decode, 'is_plain_opt', lambda d: False)
    want = vlm.said(seen, at, asked)
    assert [g[0] for g in got] == [w[0] for w in want] and all(
        np.allclose(g[1], w[1], atol=1e-6) for g, w in zip(got, want)
    )


@pytest.mark.parametrize('architecture', ['blip2-opt', 'instructblip-t5', 'llava', 'qwen3-vl', 'florence2'])
def test_one_pixel_apart(architecture, folder, tmp_path):
    """Features of one image never answer for another: one pixel changed; features on disk say the same, and only
    for their own model"""
    vlm = open_tiny(architecture, folder)
    vlm.store = tmp_path
    first = np.full((56, 56, 3), 90, np.uint8)
    other = first.copy()
    other[28, 28, 1] += 60
    a, b = (vlm.ask(im, PLAIN) for im in (first, other))
    assert (
        len(vlm._features) == 2 == len(list(tmp_path.iterdir()))
        and a.pixels_sha256 != b.pixels_sha256
        and a.confidence != b.confidence
    )
    again = open_tiny(architecture, folder)
    again.store = tmp_path
    again.core.get_image_features = again.core.vision_model = None  # nothing is computed anew
    if hasattr(again.core, 'model'):
        again.core.model.get_image_features = None
    c, d = (again.ask(im, PLAIN) for im in (first, other))
    assert [(x.text, x.confidence, x.error) for x in (a, b)] == [(x.text, x.confidence, x.error) for x in (c, d)]
    stranger = open_tiny(architecture, folder, seed=1)
    stranger.store = tmp_path
    assert not stranger.ask(first, PLAIN).error and len(list(tmp_path.iterdir())) == 3


def test_damaged_features(folder, tmp_path):
    "A torn file names itself"
    vlm = open_tiny('blip2-opt', folder)
    vlm.store = tmp_path
    vlm.ask(probe_picture(), PLAIN)
    (f,) = tmp_path.iterdir()
    f.write_bytes(f.read_bytes()[:20])
    vlm._features.clear()
    said = vlm.ask(probe_picture(), PLAIN)
    assert f.name in said.error and said.stage == 'encode'


@pytest.mark.parametrize('architecture', ['blip2-opt', 'blip2-t5', 'qwen2.5-vl', 'florence2'])
def test_stream_and_cancel(architecture, folder):
    "Pieces of a stream make the answer; cancelled, or closed by who reads, it stops and keeps nothing"
    import gc, torch
    from fada.decode import Steps

    kept = lambda: {id(o) for o in gc.get_objects() if isinstance(o, Steps)}
    gc.collect()
    before = kept()  # of whoever ran here
    vlm = open_tiny(architecture, folder)
    im = probe_picture()
    whole = vlm.ask(im, PLAIN)
    s = vlm.stream(im, PLAIN)
    assert (
        ''.join(s) == whole.text
        and np.isclose(s.answer.confidence, whole.confidence, atol=1e-5)
        and not s.answer.error
    )
    s = vlm.stream(im, PLAIN)
    n = 0
    for _ in s:
        n += 1
        s.cancel()
        assert not torch.is_inference_mode_enabled()
    assert n == 1 and s.answer.error == 'cancelled' and s.answer.text and whole.text.startswith(s.answer.text)
    reader = iter(s := vlm.stream(im, PLAIN))
    next(reader)
    reader.close()
    assert s.answer.error == 'cancelled'
    del reader
    assert not kept() - before  # memory of keys and values is free, without a collection
    assert not any('forward' in vars(m) for m in vlm.core.modules())


@pytest.mark.parametrize('architecture', ['blip2-opt', 'instructblip-t5', 'llava', 'florence2'])
def test_questions_stream_side_by_side(architecture, folder):
    """A list of questions: pieces carry the number of their question, answers, flags and confidence are those of a
    batch"""
    vlm = open_tiny(architecture, folder)
    im = probe_picture()
    want = vlm.ask(im, QUESTIONS)
    s = vlm.stream(im, QUESTIONS)
    said = [''] * 4
    for n, piece in s:
        said[n] += piece
    for a, w, text in zip(s.answers, want, said):
        assert (a.text, a.flags, a.tokens, a.error) == (w.text, w.flags, w.tokens, '') and np.isclose(
            a.confidence, w.confidence, atol=1e-5
        )
        assert a.text == text
    s = vlm.stream(im, QUESTIONS)
    s.cancel()
    assert list(s) == [] and {a.error for a in s.answers} == {'cancelled'}


@pytest.mark.parametrize('architecture', [a for a in BUILD if a != 'gemma3-text'])
def test_an_image_token_in_words_stays_out(architecture, folder):
    "Texts that stand for an image are refused in a question, by every way to ask; its neighbours are answered"
    from fada.settings import FadaError
    from fada.vlm import image_words

    vlm = open_tiny(architecture, folder, tokens=2)
    im = probe_picture()
    tok = getattr(vlm.processor, 'tokenizer', vlm.processor)
    words = image_words(vlm)
    assert tok.decode([vlm.core.config.image_token_id]) in words and str(vlm.processor.image_token) in words
    for word in words:
        bad, good = vlm.answer([Request(im, [f'what is {word} here?']), Request(im, [PLAIN])])
        assert word in bad.error and bad.stage == 'read' and not good.error, (word, bad.error, good.error)
        with pytest.raises(FadaError, match='image token'):
            vlm.stream(im, f'{word}?')
        with pytest.raises(FadaError, match='image token'):
            vlm.choose(im, f'{word}?', ['a', 'b'])


def test_out_of_memory_halves_and_remembers(folder, monkeypatch):
    """Memory that runs out over more than five rows: smaller parts, same answers, and the next time no second
    failure"""
    import torch

    vlm = open_tiny('blip2-opt', folder)
    images = pictures('blip2-opt')
    want = [a.text for im in images for a in vlm.ask(im, QUESTIONS)]
    real, sizes = vlm.begin, []

    def begin(seen, at, prompts, most):
        sizes.append(len(at))
        if len(at) > 5:
            raise torch.OutOfMemoryError('CUDA out of memory (simulated)')
        return real(seen, at, prompts, most)

    monkeypatch.setattr(vlm, 'begin', begin)
    ask = lambda: [a.text for a in vlm.answer([Request(im, QUESTIONS) for im in images])]
    assert ask() == want and sizes[0] == 12 and max(sizes[-2:]) <= 5
    failed = sum(s > 5 for s in sizes)
    assert ask() == want and sum(s > 5 for s in sizes) == failed
    monkeypatch.setattr(vlm, 'begin', lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError('out of memory')))
    said = vlm.ask(images[0], PLAIN)
    assert 'memory ran out for a single question' in said.error


def test_bad_input_is_refused_before_work(folder, monkeypatch):
    """Extreme shape, long question, empty question, no question, an image token in the words: an error each, before
    the model is touched"""
    vlm = open_tiny('llava', folder)
    im = probe_picture()
    monkeypatch.setattr(vlm.core.model, 'get_image_features', lambda *a, **k: pytest.fail('the model was touched'))
    for picture, question, says in (
        (np.zeros((8, 400, 3), np.uint8), PLAIN, '400 × 8 pixels'),
        (im, 'word ' * 2000, 'positions'),
        (im, '  ', 'an empty question'),
        (im, 'what is <image> here?', 'image token'),
    ):
        said = vlm.ask(picture, question)
        assert says in said.error, said.error
    none = list(vlm.answer([Request(im, [])]))
    assert len(none) == 1 and 'no question' in none[0].error


def test_choices_are_the_models_own(folder):
    """Log-probabilities of choices equal those of the plain forward pass, for a decoder, an encoder–decoder and a
    chat model"""
    import torch
    from fada.families import append_answers

    words = ['axial', 'femur head', 'good']
    for architecture in ('llava', 'blip2-opt', 'blip2-t5'):
        vlm = open_tiny(architecture, folder)
        im = Image.fromarray(probe_picture())
        found = vlm.choose(im, PLAIN, words)
        assert np.isclose(sum(found.probability.values()), 1) and found.text == max(found.logp, key=found.logp.get)
        prompt = build_prompt(vlm.spec, PLAIN)
        for w in words:
            ids = vlm.answer_ids(prompt, w, True)
            with torch.no_grad():
                if architecture == 'llava':
                    t = append_answers(
                        vlm.inputs([im], [vlm.render(prompt, True)[0]]), [ids], vlm.tokenizer.pad_token_id
                    )
                    t.pop('labels')
                    logp = vlm.core(**t).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
                else:
                    t = vlm.processor(images=im, text=prompt, return_tensors='pt')
                    if architecture == 'blip2-t5':
                        logp = vlm.core(**t, labels=torch.tensor([ids])).logits[0].log_softmax(-1)
                    else:
                        more = torch.tensor([ids])
                        t['input_ids'] = torch.cat([t['input_ids'], more], 1)
                        t['attention_mask'] = torch.ones_like(t['input_ids'])
                        logp = vlm.core(**t).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            assert np.isclose(found.logp[w], float(logp.gather(1, torch.tensor(ids)[:, None]).sum()), atol=1e-4), (
                architecture,
                w,
            )


def test_rules_of_a_checkpoint(folder):
    """A penalty on repetition and a forced first token in the checkpoint's settings are followed as `generate`
    follows them"""
    for architecture, rule in (
        ('qwen2.5-vl', dict(repetition_penalty=1.3)),
        ('florence2', dict(forced_bos_token_id=7, no_repeat_ngram_size=2)),
    ):
        vlm = open_tiny(architecture, folder)
        im = Image.fromarray(probe_picture())
        plain = reference_said(vlm, im, PLAIN)
        for k, v in rule.items():
            setattr(vlm.core.generation_config, k, v)
        want = [reference_said(vlm, im, q) for q in QUESTIONS]
        assert plain[0] != want[2][0]
        got = vlm.said(vlm.see([im]), [0] * 4, [build_prompt(vlm.spec, q) for q in QUESTIONS])
        for g, w in zip(got, want):
            assert same(g, w), (architecture, g, w)


def test_choices_on_the_command_line(tmp_path):
    "`fada ask --choices`: the allowed answers of quality with probabilities that add up, none for an open question"
    import json
    from typer.testing import CliRunner
    from fada.choices import CHOICES
    from fada.cli import app

    Image.fromarray(probe_picture()).resize((112, 112)).save(tmp_path / 'a.png')
    r = CliRunner().invoke(
        app,
        [
            'ask',
            str(tmp_path / 'a.png'),
            'quality',
            'structures',
            '--model',
            'blip2-nano',
            '--choices',
            '--json',
            '--quiet',
        ],
    )
    quality, structures = json.loads(r.stdout)['answers']
    assert r.exit_code == 0 and 'choices' not in structures
    p = quality['choices']
    assert (
        set(p) == set(CHOICES[6])
        and np.isclose(sum(p.values()), 1)
        and list(p.values()) == sorted(p.values(), reverse=True)
    )
