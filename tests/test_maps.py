"""Maps of every architecture: corner markers come back to their place through each processor, raw attention is the
model's own, occlusion goes through the engine and keeps nothing, a service is asked in words, and bad input is
named."""

import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from PIL import Image
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny import BUILD, row, tiny
from fada.canary import probe_picture
from fada.heads import forced, kept_bytes, look, passing_bytes, raw_map
from fada.maps import Map, load_map, relevancy_map, save_map, shown_box, to_pixels
from fada.occlude import answer_logp, answer_tokens, occlusion, prompt_of
from fada.settings import FadaError
from fada.vlm import VLM, Answer, load

SEES = [a for a in BUILD if a != 'gemma3-text']
ONE_OF_EACH = ('blip2-opt', 'blip2-t5', 'llava', 'qwen3-vl', 'florence2', 'paligemma')
quick = [a if a in ONE_OF_EACH else pytest.param(a, marks=pytest.mark.slow) for a in SEES]
ASK, SAY = 'Which plane is it?', 'axial plane'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('tiny')


def open_tiny(architecture, folder):
    name, _, weights = tiny(architecture, folder)
    return load(name, weights=weights, device='cpu', max_new_tokens=5, precision='fp32')


# ---- geometry
def seen_pixels(vlm, image) -> np.ndarray:
    """What the vision tower is given of an image, brightness by height × width; tiles put together, the whole image
    left out"""
    ip = vlm.processor.image_processor
    t = ip([image], return_tensors='np', **(vlm.tiling() if hasattr(vlm, 'tiling') else {}))
    px = np.asarray(t['pixel_values'])
    if 'image_grid_thw' in t:  # patches in the order of merged squares
        _, gh, gw = (int(v) for v in np.asarray(t['image_grid_thw'])[0])
        m, p = ip.merge_size, ip.patch_size
        px = px.reshape(gh // m, gw // m, m, m, 3, -1, p, p)[:, :, :, :, :, 0]
        return px.transpose(0, 2, 5, 1, 3, 6, 4).reshape(gh * p, gw * p, 3).mean(-1)
    px = px.reshape(-1, *px.shape[-3:])
    if len(px) == 1:
        return px[0].mean(0)
    r, c = vlm.tile_grid(image)
    return (
        px[: r * c]
        .mean(1)
        .reshape(r, c, *px.shape[-2:])
        .transpose(0, 2, 1, 3)
        .reshape(r * px.shape[-2], c * px.shape[-1])
    )


def markers(size, box):
    """Four pictures, black with one white square each, near the corners of the part that is shown; with the
    squares' middles"""
    w, h = size
    x0, y0, x1, y1 = max(0, box[0]), max(0, box[1]), min(w, box[2]), min(h, box[3])
    side = min(w, h) // 8
    for fx in (0.12, 0.88):
        for fy in (0.12, 0.88):
            x, y = x0 + fx * (x1 - x0), y0 + fy * (y1 - y0)
            a = np.zeros((h, w, 3), np.uint8)
            a[int(y - side / 2) : int(y + side / 2), int(x - side / 2) : int(x + side / 2)] = 255
            yield Image.fromarray(a), (x, y), side


def comes_back(vlm, size):
    """A marker seen in the processor's output lies, laid over the image, where it was drawn: within a quarter of
    its side"""
    box = shown_box(vlm, size)
    for image, (x, y), side in markers(size, box):
        seen = seen_pixels(vlm, image)
        bright = (seen - seen.min()) ** 4
        assert bright.any(), 'the marker was not seen'
        back = np.nan_to_num(to_pixels(bright, box, size))
        rows, cols = np.mgrid[: size[1], : size[0]]
        at = (back * cols).sum() / back.sum() + 0.5, (back * rows).sum() / back.sum() + 0.5
        assert abs(at[0] - x) < max(3, side / 4) and abs(at[1] - y) < max(3, side / 4), (
            vlm.spec.name,
            size,
            (x, y),
            at,
        )


@pytest.mark.parametrize('size', [(160, 120), (120, 200), (224, 224)])
@pytest.mark.parametrize('architecture', SEES)
def test_corner_markers_come_back(architecture, size, folder):
    comes_back(open_tiny(architecture, folder), size)


@pytest.mark.parametrize('architecture', ['smolvlm', 'internvl'])
def test_corner_markers_come_back_through_tiles(architecture, folder, monkeypatch):
    from fada import registry

    name = row(architecture).name
    monkeypatch.setitem(registry.MODELS, name, replace(registry.MODELS[name], tiles=5))
    vlm = open_tiny(architecture, folder)
    for size in ((160, 80), (120, 120)):
        comes_back(vlm, size)


def test_a_wrong_box_is_noticed(folder, monkeypatch):
    "The marker test fails where a crop is forgotten: it can fail"
    vlm = open_tiny('llava', folder)
    vlm.processor.image_processor.do_center_crop = True
    vlm.processor.image_processor.size, vlm.processor.image_processor.crop_size = (
        dict(shortest_edge=56),
        dict(height=56, width=56),
    )
    comes_back(vlm, (200, 120))
    monkeypatch.setattr(sys.modules[__name__], 'shown_box', lambda vlm, size: (0, 0, *size))
    with pytest.raises(AssertionError):
        comes_back(vlm, (200, 120))


def test_padding_to_a_square(folder):
    "LLaVA's own processor pads to a square before it resizes"
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    vlm = open_tiny('llava', folder)
    vlm.processor.image_processor = LlavaImageProcessorPil(
        do_pad=True, size=dict(shortest_edge=56), crop_size=dict(height=56, width=56)
    )
    assert shown_box(vlm, (200, 120)) == (0, -40, 200, 160)
    comes_back(vlm, (200, 120))


# ---- maps
@pytest.mark.parametrize('architecture', quick)
def test_occlusion_of_every_family(architecture, folder):
    """Log-probabilities by the engine equal those of one plain pass; the map is finite, and nothing of covered
    images is kept"""
    import torch

    vlm = open_tiny(architecture, folder)
    image = probe_picture()
    ids = answer_tokens(vlm, ASK, SAY)
    run, _, rows = forced(vlm, image, prompt_of(vlm, ASK), ids)
    with torch.no_grad():
        plain = run().logits[0, rows].float().log_softmax(-1)[range(len(ids)), ids]
    got = answer_logp(vlm, [image, image[::-1].copy()], ASK, SAY)
    assert np.allclose(got[0], plain.numpy(), atol=1e-4) and not np.allclose(got[0], got[1], atol=1e-5)
    m = occlusion(vlm, image, ASK, SAY, grid=3, fill='black')
    assert (
        m.heat.shape == (3, 3)
        and m.per_token.shape == (len(m.tokens), 3, 3)
        and np.isfinite(m.heat).all()
        and np.abs(m.heat).max() > 0
    )
    assert len(vlm._features) == 0


@pytest.mark.parametrize('architecture', quick)
def test_raw_attention_of_every_family(architecture, folder):
    "Shares of rows that the softmax made, of answer tokens and image columns alone; the model is left as it was"
    import torch

    vlm = open_tiny(architecture, folder)
    image = probe_picture()
    ids = answer_tokens(vlm, ASK, SAY)
    run, columns, rows = forced(vlm, image, prompt_of(vlm, ASK), ids)
    how = vlm.core.config._attn_implementation
    with torch.no_grad():
        before = run().logits
    h = look(vlm, image, ASK, SAY)
    with torch.no_grad():
        assert torch.equal(run().logits, before)
    assert vlm.core.config._attn_implementation == how
    L, H, T, C = h.language.shape
    assert (
        (T, C) == (len(ids), int(columns.sum()))
        and 0 <= h.language.min()
        and h.language.astype(float).sum(-1).max() <= 1.01
    )
    assert h.language.nbytes == kept_bytes(L, H, T, C)
    maps = h.maps()
    m = raw_map(h)
    assert (
        maps.ndim == 5
        and maps.shape[2] == T
        and np.isfinite(maps).all()
        and 'attention' in m.method
        and m.pixels().shape == image.shape[:2]
    )
    other = look(vlm, image[::-1].copy(), ASK, SAY)
    assert not np.allclose(other.maps(), maps)


@pytest.mark.parametrize('architecture', ['blip2-opt', 'llava', 'florence2', 'blip2-t5'])
def test_kept_rows_equal_the_whole(architecture, folder):
    "What one lean pass keeps is a part of the full attention of the same pass"
    import re, torch
    from fada.attention import captured

    vlm = open_tiny(architecture, folder)
    image = probe_picture()
    ids = answer_tokens(vlm, ASK, SAY)
    run, columns, rows = forced(vlm, image, prompt_of(vlm, ASK), ids)
    names = {id(m): n for n, m in vlm.core.named_modules()}
    with captured(vlm.core) as caught, torch.no_grad():
        run()
        whole = [(names[id(m)], w[0]) for m, w in caught if not re.search('vision|visual|qformer', names[id(m)])]
    two = vlm.core.config.get_text_config().is_encoder_decoder
    whole = [w[:, rows][..., columns] for n, w in whole if not two or re.search('EncDecAttention|encoder_attn', n)]
    assert np.allclose(look(vlm, image, ASK, SAY).language.astype(float), torch.stack(whole).numpy(), atol=1e-3)


def test_memory_for_llava():
    """Kept and passing attention of LLaVA-1.5-7B's shape, with the longest answer that the questions allow, is
    under 100 MB"""
    for tokens in (12, 32, 48):
        assert kept_bytes(32, 32, tokens, 576) + passing_bytes(32, tokens, 576 + 96 + tokens) < 100e6
    assert 2 * 32 * 32 * 700 * 700 > 100e6  # whole matrices would not be


CHATS = ('llava', 'gemma3', 'qwen2.5-vl', 'qwen3-vl', 'internvl', 'smolvlm', 'paligemma')


def said_by(vlm, image, ids):
    "Inputs in which a chat model says `ids`, and the rows that say them"
    from fada.families import append_answers

    t = append_answers(
        vlm.inputs([image], [vlm.render(prompt_of(vlm, ASK), True)[0]]),
        [ids],
        vlm.tokenizer.pad_token_id,
        kind=vlm.said_kind,
    )
    t.pop('labels')
    first = t['input_ids'].shape[1] - len(ids) - 1
    return t, slice(first, first + len(ids))


def all_layers(core, caught) -> list:
    "(dotted name, head-averaged positive gradient × attention) of all layers but the vision tower's, in order"
    from fada.attention import _weighted
    from fada.registry import part_of

    names = {id(m): n for n, m in core.named_modules()}
    return [
        (names[id(m)], _weighted(w))
        for m, w in caught
        if w.grad is not None and part_of(names[id(m)]) != 'vision_model'
    ]


@pytest.mark.parametrize(
    'architecture', [a if a in ('llava', 'paligemma') else pytest.param(a, marks=pytest.mark.slow) for a in CHATS]
)
def test_relevancy_carried_down_equals_all_kept(architecture, folder):
    """Head by head and layer by layer gives what all attention matrices with their gradients give; nothing of the
    model changes"""
    import torch
    from fada.attention import captured, carried_down
    from fada.families import graph_from

    vlm = open_tiny(architecture, folder)
    ids = answer_tokens(vlm, ASK, SAY)
    t, rows = said_by(vlm, Image.fromarray(probe_picture()), ids)
    kept = []
    for k, token in enumerate(ids):
        with captured(vlm.core) as caught, graph_from(vlm.core.get_input_embeddings()), torch.enable_grad():
            vlm.core(**t).logits[0, rows.start + k].float().log_softmax(-1)[token].backward()
            seen = torch.eye(t['input_ids'].shape[1])
            for _, a in all_layers(vlm.core, caught):
                seen = seen + a @ seen
        kept.append(seen[rows.start + k, : rows.stop])
        vlm.core.zero_grad(set_to_none=True)
    how = {n: p.requires_grad for n, p in vlm.core.named_parameters()}
    got = carried_down(vlm.core, t, rows, ids)
    own = torch.nn.functional.one_hot(torch.arange(rows.start, rows.stop), rows.stop)
    kept = torch.stack(kept) - own
    assert kept.abs().max() > 0 and torch.allclose(got - own, kept, rtol=1e-3, atol=1e-4 * float(kept.abs().max()))
    assert {n: p.requires_grad for n, p in vlm.core.named_parameters()} == how and all(
        p.grad is None for p in vlm.core.parameters()
    )
    assert not any('forward' in m.__dict__ for m in vlm.core.modules())


def whole_relevancy(vlm, image, ids):
    """Relevancy with every matrix of one whole pass kept, for models with a Q-Former or an encoder: tokens ×
    patches or image tokens"""
    import re, torch
    from fada.attention import CROSS, captured
    from fada.families import graph_from, through_qformer
    from fada.vlm import pixel_values, project

    core, prompt = vlm.core, prompt_of(vlm, ASK)
    out = []
    florence = hasattr(vlm, 'render')
    for k, token in enumerate(ids):
        if florence:
            t = vlm.inputs([image], [prompt])
            start = core.get_input_embeddings()
            run = lambda: core(**t, labels=torch.tensor([ids])).logits[0, k]
            n, at, two = t['input_ids'].shape[1], k, True
        else:
            row, two = vlm.processor.tokenizer(prompt)['input_ids'], core.config.text_config.is_encoder_decoder
            start = core.qformer.embeddings.layernorm if hasattr(vlm, 'read') else core.qformer.layernorm
            patches = core.vision_model(pixel_values(vlm, [image])).last_hidden_state.detach()
            q = core.query_tokens.shape[1]
            n = q + len(row) + (0 if two else len(ids))
            at = k if two else q + len(row) - 1 + k

            def run():
                x = vlm.read(patches, [prompt]) if hasattr(vlm, 'read') else project(vlm, patches)
                x = torch.cat([x, core.get_input_embeddings()(torch.tensor([row + ([] if two else ids)]))], 1)
                return core.language_model(
                    inputs_embeds=x,
                    attention_mask=torch.ones(x.shape[:2], dtype=torch.long),
                    **(dict(labels=torch.tensor([ids])) if two else {}),
                ).logits[0, at]

        with captured(core) as caught, graph_from(start), torch.enable_grad():
            run().float().log_softmax(-1)[token].backward()
            layers = all_layers(core, caught)
            core.zero_grad(set_to_none=True)
        read, said = torch.eye(n), torch.zeros(len(ids), n)
        for name, a in layers:
            if 'qformer' in name:
                continue
            if re.search(CROSS, name):
                said = said + a @ read
            elif not two or '.encoder.' in name:
                read = read + a @ read
            else:
                said = said + a @ said
        row = (said if two else read)[at]
        out.append(
            row[t['input_ids'][0] == core.config.image_token_id]
            if florence
            else row[:q] @ through_qformer([a for name, a in layers if 'qformer' in name], q, patches.shape[1])
        )
    return torch.stack(out)


BOUND = ('florence2', 'blip2-t5', 'instructblip-t5', 'instructblip-llama')


@pytest.mark.parametrize(
    'architecture', [a if a in ('florence2', 'blip2-t5') else pytest.param(a, marks=pytest.mark.slow) for a in BOUND]
)
def test_relevancy_through_an_encoder_or_q_former_equals_all_kept(architecture, folder):
    "In the memory of one layer as with everything kept; nothing of the model changes"
    vlm = open_tiny(architecture, folder)
    ids = answer_tokens(vlm, ASK, SAY)
    image = Image.fromarray(probe_picture())
    how = {n: p.requires_grad for n, p in vlm.core.named_parameters()}
    kept = whole_relevancy(vlm, image, ids)[:, 1:].detach().numpy()
    got = vlm.token_maps(image, prompt_of(vlm, ASK), ids).reshape(len(ids), -1)
    kept = kept if got.shape == kept.shape else whole_relevancy(vlm, image, ids).detach().numpy()
    assert kept.max() > 0 and np.allclose(got, kept, rtol=1e-3, atol=1e-5 * kept.max()), (
        np.abs(got - kept).max() / kept.max()
    )
    assert {n: p.requires_grad for n, p in vlm.core.named_parameters()} == how and all(
        p.grad is None for p in vlm.core.parameters()
    )
    assert not any('forward' in m.__dict__ for m in vlm.core.modules())


def test_memory_of_relevancy_for_llava():
    """A run on the shapes of LLaVA-1.5-7B: beyond the weights under 100 MB on the card, and no more with
    more layers"""
    from fada.attention import carried_down
    from fada.dry import DryRun
    from fada.families import append_answers
    from fada.models import model_spec
    from fada.plan import _shallow, shape_of, shell

    spec, ids, peaks = model_spec('llava-1.5-7b'), [5] * 48, {}
    for layers in (1, 2):
        vlm = shell(spec, _shallow(shape_of(spec), layers))
        dry = DryRun(vlm.model, device='cuda')

        def run():
            t = append_answers(vlm.inputs([Image.new('RGB', (16, 16))], ['i q']), [ids], 0)
            t.pop('labels')
            dry.phase()
            first = t['input_ids'].shape[1] - len(ids) - 1
            assert first > 576
            carried_down(vlm.core, t, slice(first, first + 2), ids[:2])

        dry.run(run)
        peaks[layers] = dry.peaks[-1]
    assert 30e6 < peaks[1] == peaks[2] < 100e6, peaks


def test_memory_of_relevancy_for_florence():
    """A run on the shapes of Florence-2-base, all layers, for an answer of twelve tokens: under 100 MB beyond the
    weights on the card"""
    from fada.attention import read_down
    from fada.dry import DryRun
    from fada.models import model_spec
    from fada.plan import shape_of, shell

    spec = model_spec('florence-2-base')
    vlm = shell(spec, shape_of(spec))
    dry = DryRun(vlm.model, device='cuda')

    def run():
        t = vlm.inputs([Image.new('RGB', (16, 16))], ['q'])
        x = vlm.core.get_input_embeddings()(t['input_ids']).detach()
        assert x.shape[1] > 577
        dry.phase()
        read_down(vlm.core, x, t['attention_mask'], [5] * 12)

    dry.run(run)
    assert 20e6 < dry.peaks[-1] < 100e6, dry.peaks


def test_time_of_maps(root):
    "Relevancy and raw attention of an answer take at most three times the answer's own time, as the bench takes them"
    import runpy, torch

    times = runpy.run_path(str(root / 'bench' / 'attention.py'))['times']
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = times(load('blip2-nano', device='cpu', precision='fp32'), runs=7)
    torch.set_num_threads(threads)
    assert best['relevancy'] < 3 * best['answer'] and best['raw attention'] < 3 * best['answer'], best


# ---- services and bad input
class Service:
    "A back end without weights that says what it sees: whether the left half of the image is bright"

    core, paid = None, False

    class processor:
        pass

    def __init__(self, fails=()):
        self.spec, self.asked, self.fails = row('llava'), 0, fails

    def answer(self, requests):
        for r in requests:
            for q in r.questions:
                self.asked += 1
                a = np.asarray(r.image.convert('L') if hasattr(r.image, 'convert') else r.image)
                yield Answer(
                    q,
                    'liver, spine' if a[:, : a.shape[1] // 2].mean() > 60 else 'spine',
                    error='down' if self.asked in self.fails else '',
                )

    def ask(self, image, question):
        return next(iter(self.answer([type('R', (), dict(image=image, questions=[question]))])))


def test_a_service_is_asked_in_words():
    "Cells whose cover changes the words are found; money is spent on request only; a failed question is no map"
    image = np.zeros((80, 80), np.uint8)
    image[20:60, 5:35] = 200
    v = Service()
    m = occlusion(v, image, 1, grid=4, fill='black')
    assert (
        v.asked == 17 and m.units == 'share of words lost' and m.heat[1:3, :2].min() > 0 and m.heat[:, 2:].max() == 0
    )
    with pytest.raises(FadaError, match='one map for the whole answer'):
        m.tokenwise()
    v = Service()
    v.paid = True
    with pytest.raises(FadaError, match='17 paid questions'):
        occlusion(v, image, 1, grid=4)
    assert v.asked == 0 and occlusion(v, image, 1, grid=4, fill='black', paid=True).heat.max() > 0
    with pytest.raises(FadaError, match='covered image got no answer'):
        occlusion(Service(fails=[5]), image, 1, grid=4)
    with pytest.raises(FadaError, match='no weights at hand'):
        look(Service(), image, 1, 'spine')
    with pytest.raises(FadaError, match='gives no attention'):
        relevancy_map(Service(), image, 1, 'spine')


def test_bad_input(folder, monkeypatch):
    vlm = open_tiny('blip2-opt', folder)
    image = probe_picture()
    for f in (
        lambda a: relevancy_map(vlm, image, 1, a),
        lambda a: occlusion(vlm, image, 1, a),
        lambda a: look(vlm, image, 1, a),
    ):
        with pytest.raises(FadaError, match='zero tokens'):
            f('  ')
    with pytest.raises(FadaError, match='a grid of'):
        occlusion(vlm, image, 1, SAY, grid=1000)
    with pytest.raises(FadaError, match='8 pixels a side'):
        occlusion(vlm, image[:4], 1, SAY)
    with pytest.raises(FadaError, match='memory ran out'):
        monkeypatch.setattr(VLM, 'see', lambda *a: (_ for _ in ()).throw(MemoryError()))
        occlusion(vlm, image, 1, SAY)


def test_memory_that_runs_out_for_one_map(folder, monkeypatch):
    "A smaller request is offered"
    import fada.attention as attention

    vlm = open_tiny('blip2-opt', folder)

    def full(*a, **kw):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(attention, '_capture', full)
    for f in (relevancy_map, look):
        with pytest.raises(FadaError, match='memory ran out for a map of an image'):
            f(vlm, probe_picture(), ASK, SAY)


def test_memory_that_runs_out_makes_smaller_parts(folder, monkeypatch):
    "Where many images do not fit together they go through in smaller parts, with the same result"
    vlm = open_tiny('blip2-opt', folder)
    image = probe_picture()
    want = occlusion(vlm, image, ASK, SAY, grid=3).heat
    see = VLM.see
    sizes = []

    def tight(self, images):
        sizes.append(len(images))
        if len(images) > 2:
            raise MemoryError
        return see(self, images)

    monkeypatch.setattr(VLM, 'see', tight)
    got = occlusion(vlm, image, ASK, SAY, grid=3).heat
    assert max(sizes) > 2 and sizes[-1] <= 2 and np.allclose(got, want, atol=1e-5)


def test_attention_that_cannot_be_caught(folder, monkeypatch):
    "A model that ignores the attention interface is an error, and the way of attending is put back"
    import fada.attention as attention

    vlm = open_tiny('blip2-opt', folder)
    how = vlm.core.config._attn_implementation
    monkeypatch.setattr(type(vlm.core), 'set_attn_implementation', lambda self, kind: None)
    for f in (relevancy_map, look):
        with pytest.raises(FadaError, match='could be caught'):
            f(vlm, probe_picture(), ASK, SAY)
    monkeypatch.undo()
    monkeypatch.setattr(attention, '_part', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        look(vlm, probe_picture(), ASK, SAY)
    assert vlm.core.config._attn_implementation == how and attention._keep is None


def test_a_map_file_from_elsewhere(tmp_path):
    "An archive with pickled objects is refused, not opened"
    np.savez(tmp_path / 'evil.npz', image=np.array([object()], object), heat=np.zeros((2, 2)), box=np.zeros(4))
    with pytest.raises(FadaError, match='no map'):
        load_map(tmp_path / 'evil.npz')


def test_a_crop_on_disk(tmp_path):
    m = Map(np.zeros((10, 20, 3), np.uint8), np.ones((2, 2)), (5, 0, 15, 10), 'x', 'u', 'q', 'a', 'm')
    again = load_map(save_map(m, tmp_path / 'a'))
    assert np.isnan(again.pixels()[:, 0]).all() and (again.pixels()[:, 10] == 1).all()


@pytest.mark.slow
def test_the_check_tells_a_map_that_knows_from_one_that_does_not():
    """With the mask itself as a method every control is beaten on energy and overlap, and all but the centre on
    pointing, for a structure may lie in the middle; the sector earns no badge"""
    from fada.checked import BLIND, KEPT, TESTED, check_maps, controls_of, map_table, verdict
    from fada.occlude import sector_mask

    vlm = load('blip2-nano', device='cpu', precision='fp32')
    knows = {
        'truth': lambda v, s: s.mask * (1.0 if v is vlm else 0.0),
        'the sector': lambda v, s: sector_mask(s.image).astype(float),
    }
    scores, counts = check_maps(vlm, ['Abdomen'], 7, seed=3, methods=knows)
    assert 5 <= counts[KEPT] <= counts[TESTED] <= 7 and set(scores.what) == {
        *BLIND,
        *knows,
        *(f'{k} (random weights)' for k in knows),
    }
    missed = verdict(scores, 'truth')
    assert not [m for m in missed if m[1] in ('energy', 'iou') or m[1] == 'pointing' and m[0] != 'centre'], missed
    assert {c for c, _ in verdict(scores, 'the sector')} >= {'sector', 'the sector (random weights)'}
    assert f'{counts[KEPT]} of {counts[TESTED]} pairs kept' in map_table(scores, counts)
    assert controls_of('x') == (*BLIND, 'x (random weights)')


# ---- one call
def test_an_explanation_lies_on_the_image_as_given(folder):
    "A picture whose sides a processor cuts off: the map has the picture's pixels, what was cut off has no value"
    from fada.explain import explain, methods

    vlm = open_tiny('llava', folder)
    ip = vlm.processor.image_processor
    ip.do_center_crop, ip.size, ip.crop_size = True, dict(shortest_edge=56), dict(height=56, width=56)
    m = explain(vlm, Image.fromarray(probe_picture()).resize((200, 100)), ASK, SAY)
    p = m.pixels()
    assert (
        p.shape == (100, 200)
        and np.isfinite(p[:, 50:150]).all()
        and np.isnan(p[:, :50]).all()
        and np.isnan(p[:, 150:]).all()
    )
    assert m.badge == 'never checked for this model' and m.size == (200, 100) and len(m.per_token) == len(m.tokens)
    assert methods(vlm)[0] == 'relevancy' and 'raw attention, sinks hidden' in methods(vlm)
    with pytest.raises(FadaError, match='no map by'):
        explain(vlm, probe_picture(), ASK, SAY, 'grad-cam')


def test_a_badge_belongs_to_exactly_these_weights(tmp_path, monkeypatch):
    "Verdicts are found by base and adapter together; a model trained further was never checked"
    import pandas as pd
    from fada.checked import BADGE, BLIND, KEPT, SCORES, TESTED
    from fada.explain import badge, keep_verdicts

    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path))
    rng = np.random.default_rng(0)
    rows = lambda what, up: [
        dict(what=what, patient=p, **{s: (-1 if s.startswith('del') else 1) * up + v for s in SCORES})
        for p, v in enumerate(rng.normal(0, 0.01, 12))
    ]
    controls = [r for w in (*BLIND, 'good (random weights)', 'bad (random weights)') for r in rows(w, 0.1)]
    vlm = Service()
    vlm.base, vlm.adapter = 'a' * 64, None
    assert keep_verdicts(
        vlm, pd.DataFrame(controls + rows('good', 0.2) + rows('bad', 0.1)), n := {TESTED: 12, KEPT: 12}
    ).is_relative_to(tmp_path)
    said = [badge(vlm, m) for m in ('good', 'bad', 'other')]
    never = 'never checked for this model'
    assert (
        said[0].startswith(BADGE)
        and said[1].startswith('not verified for this model: does not beat uniform')
        and said[2] == never
    )
    vlm.adapter = 'b' * 64
    assert badge(vlm, 'good') == never
    with pytest.raises(FadaError, match='without a digest'):
        keep_verdicts(Service(), pd.DataFrame(controls), n)


# ---- base and fine-tuned
@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    "An adapter that taught nano a plane that it was never shown, and one of its test pictures"
    from fada.data import load_table, prepare, read_image
    from fada.finetune import finetune

    d = tmp_path_factory.mktemp('taught')
    prepare(d / 'data', 40, ['Aorta'], 2, source='phantoms')
    finetune(
        load('blip2-nano', device='cpu', precision='fp32'),
        d / 'data',
        ['Aorta'],
        d / 'adapter',
        steps=40,
        lr=5e-3,
        batch=8,
        checks=1,
        validation_images=4,
    )
    return d / 'adapter', read_image(d / 'data' / load_table(d / 'data', split='test').image.iloc[0])


@pytest.mark.slow
def test_base_beside_fine_tuned(taught):
    """The maps of a fine-tuned model are those of base and adapter together: the same as of the merged weights,
    others than the base's, and the base's again once the adapter is switched off; side by side on one scale, each
    with its own answer and badge"""
    import matplotlib.pyplot as plt
    from fada.explain import explain
    from fada.plots import side_by_side
    from fada.vlm import merge

    adapter, image = taught
    open_ = lambda a=None: load('blip2-nano', a, device='cpu', precision='fp32')
    base, tuned, merged = open_(), open_(adapter), merge(open_(adapter))
    says = [v.ask(image, 1).text for v in (base, tuned)]
    assert says[0] != says[1] and 'aorta' in says[1]
    for method in ('relevancy', 'raw attention', 'occlusion, blur'):
        a, b, c = (explain(v, image, 1, says[1], method) for v in (base, tuned, merged))
        top = np.abs(b.heat).max()
        assert np.allclose(b.heat, c.heat, atol=1e-3 * top) and np.abs(a.heat - b.heat).max() > 0.05 * top, method
        with tuned.model.disable_adapter():
            tuned._features.clear()
            assert np.allclose(
                explain(tuned, image, 1, says[1], method).heat, a.heat, atol=1e-3 * np.abs(a.heat).max()
            )
        tuned._features.clear()
        assert a.badge.startswith('not verified') and b.badge == c.badge == 'never checked for this model'
    maps = {n: explain(v, image, 1) for n, v in dict(base=base, tuned=tuned).items()}
    assert [m.answer for m in maps.values()] == says
    fig = side_by_side(maps, one_scale=True)
    drawn = [ax.images[1] for ax in fig.axes[:2]]
    assert drawn[0].get_clim() == drawn[1].get_clim() and [ax.get_title().split('\n')[0] for ax in fig.axes[:2]] == [
        'base',
        'tuned',
    ]
    plt.close(fig)


# ---- integrated gradients
WHOLE = [a for a in SEES if a not in ('qwen2.5-vl', 'qwen3-vl')]


@pytest.mark.parametrize(
    'architecture', [a if a in ('blip2-opt', 'llava') else pytest.param(a, marks=pytest.mark.slow) for a in WHOLE]
)
def test_integrated_gradients_add_up(architecture, folder):
    """Token by token the map sums to what the log-probability gained from black to the picture; a dim one, for
    random weights are rough on a long way"""
    from fada.gradients import gradient_map

    vlm = open_tiny(architecture, folder)
    image = probe_picture() // 8
    m = gradient_map(vlm, image, ASK, SAY, grid=8)
    real, black = answer_logp(vlm, [image, np.zeros_like(image)], ASK, SAY)
    gained = real - black
    assert m.per_token.shape == (len(m.tokens), 8, 8) and np.abs(gained).max() > 0
    assert np.allclose(m.per_token.sum((1, 2)), gained, atol=0.05 * np.abs(gained).max() + 1e-5), (
        m.per_token.sum((1, 2)),
        gained,
    )


def test_integrated_gradients_want_one_picture(folder):
    from fada.gradients import gradient_map
    from fada.explain import methods

    vlm = open_tiny('qwen3-vl', folder)
    with pytest.raises(FadaError, match='in parts'):
        gradient_map(vlm, probe_picture(), ASK, SAY)
    assert 'integrated gradients' not in methods(vlm)
    with pytest.raises(FadaError, match='no weights at hand'):
        gradient_map(Service(), probe_picture(), 1, 'spine')
