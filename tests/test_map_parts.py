"The small parts that maps, their checks and their pictures are made of, one by one."

import numpy as np
import pytest
from PIL import Image
from fada.settings import FadaError
from fada.phantoms import make_phantom, make_twins
from fada.vlm import load


@pytest.fixture(scope='module')
def nano():
    return load('blip2-nano', device='cpu', precision='fp32')


@pytest.fixture(scope='module')
def picture():
    return make_phantom('Abdomen', (3, 1, 0)).image


def test_gradients_of_a_known_curve():
    """Integrated along the way from one picture to another the shares add up to what the answer gained, token by
    token, and `only` picks"""
    import torch
    from types import SimpleNamespace as Of
    from fada.gradients import faded

    weight = torch.randn(5, 2 * 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    run = lambda px: Of(
        logits=torch.stack([(weight @ px.flatten().repeat(2)) ** 2 * 0.05, weight @ px.flatten().repeat(2)])[None]
    )
    empty, real = torch.zeros(1, 3, 4, 4), torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    shares, gained = faded(run, empty, real, slice(0, 2), [1, 4], 24)
    assert shares.shape == (2, 3, 4, 4) and np.abs(gained).min() > 0.01
    assert np.allclose(shares.sum((1, 2, 3)), gained, atol=1e-3)
    second, _ = faded(run, empty, real, slice(0, 2), [1, 4], 24, only=slice(1, 2))
    assert np.allclose(second[0], shares[1], atol=1e-5)


def test_covers_and_what_they_leave(nano, picture):
    """Speckle is grey as the sector and black around it, the same for one seed; nothing of a covered picture is
    kept, whatever happens"""
    from fada.occlude import nothing_kept, sector_mask, speckle_like, text_change

    im = Image.fromarray(picture)
    one = np.asarray(speckle_like(im))
    inside = sector_mask(im)
    assert one.shape == (*inside.shape, 3) and not one[~inside].any()
    assert abs(one[inside].mean() - picture[inside].mean()) < 3 and one[inside].std() > 5
    assert np.array_equal(one, np.asarray(speckle_like(im))) and not np.array_equal(
        one, np.asarray(speckle_like(im, 1))
    )
    said = nano.ask(im, 3)
    before = nano._features
    held = len(before)
    assert held
    with pytest.raises(ZeroDivisionError), nothing_kept(nano):
        nano.ask(Image.fromarray(one), 3)
        raise ZeroDivisionError
    assert nano._features is before and len(before) == held
    assert text_change(nano, [im], 3, said.text).tolist() == [0] and text_change(nano, [im], 3, 'zebra').tolist() == [
        1
    ]


def test_a_structure_is_named_by_its_tokens(nano):
    "The span of a list's tokens that say one structure; twins that differ in one thing tell which"
    from fada.checked import naming_span, one_structure
    from fada.clinical import write_answer
    from fada.occlude import answer_tokens

    twins = make_twins('Abdomen', 'structure', (0, 1))
    gone = one_structure(twins)
    first, second = (t.answers[1]['structures'] for t in (twins.first, twins.second))
    assert gone in first and gone not in second
    for name in first:
        answer, span = naming_span(nano, first, name)
        ids = answer_tokens(nano, 1, answer)
        spoken = nano.processor.tokenizer.decode(ids[span])
        word = write_answer(1, dict(structures=[name]))
        assert answer.endswith(word) and spoken.strip() == word, (name, answer, spoken)


def test_scores_of_one_map(nano):
    """The mask itself points where it should; a map of nothing but zeros is drawn by lot; the span's map lies on
    the picture"""
    from fada.checked import FAITH, Sample, make_sample, score_map, span_map

    s = next(s for k in range(20) if (s := make_sample(nano, 'Abdomen', k)))
    assert isinstance(s, Sample) and s.mask.shape == s.image.shape[:2]
    best, none = score_map(nano, s, s.mask.astype(float)), score_map(nano, s, np.zeros(s.mask.shape))
    assert best['pointing'] == best['energy'] == 1 and 0 <= none['iou'] < best['iou'] <= 1
    assert all(f'{w} ({f})' in best for w in ('deletion', 'insertion') for f in FAITH)
    heat = span_map('relevancy', nano, s)
    assert heat.shape == s.mask.shape and np.nanmax(heat) > 0


def test_a_map_knows_its_picture_and_memory_that_runs_out(nano, picture):
    from fada.maps import as_map, room_for, shown_box

    im = Image.fromarray(picture)
    m = as_map(nano, im, np.eye(4), 'mine', 'shares', 3, 'abdomen')
    assert (m.method, m.units, m.question, m.answer, m.model) == ('mine', 'shares', '3', 'abdomen', 'blip2-nano')
    assert tuple(m.box) == tuple(shown_box(nano, im.size)) and m.image.shape == (*picture.shape[:2], 3)
    with pytest.raises(FadaError, match='memory ran out for a map.*224 × 224'), room_for(nano, im):
        raise MemoryError
    with pytest.raises(RuntimeError, match='another thing'), room_for(nano, im):
        raise RuntimeError('another thing')


def test_colours_have_a_scale_with_zero_on_it():
    import matplotlib.pyplot as plt
    from fada.attention import LABEL
    from fada.plots import colour_bar, colour_limits

    assert colour_limits([[1, 2], [np.nan, -3]]) == (-3, 2) and colour_limits([[5.0]]) == (0, 5)
    assert colour_limits([[np.nan]]) == (0, 1) and colour_limits([[0.0, 0.0]])[1] > 0
    f, ax = plt.subplots()
    bar = colour_bar(ax.imshow(np.eye(3), alpha=0.3), ax, 'shares')
    plt.close(f)
    assert bar.ax.get_ylabel() == f'shares ({LABEL})' and bar.solids.get_alpha() == 1


def test_which_methods_a_row_has():
    """None where asking may cost money; inside a model only where its attention is read; integrated gradients only
    for one whole picture"""
    from fada.explain import EXPLAIN, methods_of
    from fada.registry import MODELS

    assert (
        methods_of(MODELS['openai']) == methods_of(MODELS['medgemma-4b-text']) == methods_of(MODELS['ensemble']) == []
    )
    assert set(methods_of(MODELS['blip2-nano'])) == set(EXPLAIN)
    from dataclasses import replace

    blind = replace(
        MODELS['blip2-nano'], capabilities=[c for c in MODELS['blip2-nano'].capabilities if c != 'attention']
    )
    assert (
        all(m.startswith('occlusion') or m == 'integrated gradients' for m in methods_of(blind))
        and len(methods_of(blind)) >= 2
    )


def test_heads_keep_only_what_can_be_drawn(nano, picture):
    "Rows of the answer over columns of the image; layers of the tower are not kept"
    import torch
    from fada.heads import Heads, keeper, look

    keep = keeper(nano.core, torch.arange(16), slice(20, 23), False)
    named = dict(nano.core.named_modules())
    tower = next(m for n, m in named.items() if n.endswith('self_attn') and 'vision' in n)
    words = next(m for n, m in named.items() if n.endswith('self_attn') and 'language' in n)
    assert keep(tower, 50, 50) is None and keep(words, 10, 10) is None and keep(words, 30, 30)[0] == slice(20, 23)
    h = look(nano, Image.fromarray(picture), 3)
    assert isinstance(h, Heads)
    assert h.nbytes == h.language.nbytes + h.qformer.nbytes > 0 and h.language.shape[2] == len(h.tokens)
