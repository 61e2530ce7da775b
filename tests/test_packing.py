"Packed questions against one row a question: the same loss, the same gradients, for every architecture that packs."

import sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny
from fada.data import load_table
from fada.loop import LoraRecipe, Material
from fada.packing import PACKS, block_mask, pack
from fada.train import add_lora
from fada.vlm import load


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('packing')


@pytest.mark.parametrize('architecture', PACKS)
def test_loss_and_gradients_of_separate_rows(architecture, folder, small_data):
    """fp32, three images with all their questions: loss to 1e-5, gradients of every trained weight to 1e-5; kept
    features or not"""
    import torch

    name, _, weights = tiny(architecture, folder)
    vlm = load(name, weights=weights, device='cpu', precision='fp32', max_new_tokens=4)
    torch.manual_seed(0)
    add_lora(vlm, 2)
    table = load_table(small_data, ['Femur'], 'train')
    trained = [p for n, p in vlm.model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p) * 0.05)  # an adapter of zeros would hide half of the gradients

    def gradients(recipe, cache=None):
        m = Material(vlm, small_data, table, recipe, cache)
        vlm.model.zero_grad()
        loss = m.loss([0, 3, 5])
        loss.backward()
        return (
            m,
            float(loss.detach()),
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]),
        )

    m, packed, g = gradients(LoraRecipe(), folder / f'{architecture}.npy')
    assert m.packs and m.kept == (not vlm.spec.trained_parts or not m.chat)
    n, apart, h = gradients(LoraRecipe(packing=False, cache=False))
    assert not n.packs and not n.kept
    _, fresh, k = gradients(LoraRecipe(cache=False))
    assert abs(packed - apart) < 1e-5 and abs(fresh - apart) < 1e-5
    scale = max(1.0, float(h.abs().max()))
    assert float(h.abs().max()) > 1e-3
    assert float((g - h).abs().max()) < 1e-5 * scale and float((k - h).abs().max()) < 1e-5 * scale
    assert m.count([0, 3, 5]) == n.count([0, 3, 5]) > 0


@pytest.mark.parametrize('architecture', ['llava', 'gemma3', 'internvl', 'smolvlm'])
def test_words_and_features_of_a_chat_prefix(architecture, folder, small_data):
    """The head ends with the image; its placeholders take the features in their order, every other place its own
    word"""
    import torch

    name, _, weights = tiny(architecture, folder)
    vlm = load(name, weights=weights, device='cpu', precision='fp32', max_new_tokens=4)
    m = Material(vlm, small_data, load_table(small_data, ['Femur'], 'train'), LoraRecipe(cache=False))
    assert m.heads[0] is None
    m.lay_out(0, m.picture(0))
    m.lay_out(3, m.picture(3))
    image = vlm.core.config.image_token_id
    head = m.heads[0]
    here = torch.tensor(head) == image
    assert image in head and vlm.image_end(head) == len(head) and head == m.heads[3]
    assert not any(image in prompt for prompt, _ in m.tokens[0])
    for (prompt, answer), (_, said) in zip(m.tokens[0], m.rows[0]):
        assert said in vlm.tokenizer.decode(prompt + answer) and said not in vlm.tokenizer.decode(prompt)
    words = vlm.words()
    features = torch.randn(2, int(here.sum()), words.embed.weight.shape[1])
    with torch.no_grad():
        x, together = m.chat_prefix([0, 3], features)
    assert torch.equal(x[0, here], features[0]) and torch.equal(x[1, here], features[1])
    with torch.no_grad():
        assert torch.equal(x[0, ~here], words.embed(torch.tensor(head)[~here]))
    assert (together is None) == (architecture != 'gemma3') and (together is None or torch.equal(together[1], here))


def test_nothing_leaks_between_questions():
    """The mask of two images with ragged questions: image, own question up to here, nothing else; padding is seen
    by nobody"""
    p = pack([[([5, 6], [7]), ([8], [9, 2])], [([1], [2])]])
    sees = block_mask(p, 3)
    assert sees.shape == (2, 9, 9) and sees[0, 6].tolist() == [True] * 3 + [False] * 3 + [True, False, False]
    assert sees[1, 4].tolist() == [True] * 3 + [True, True] + [False] * 4 and not sees[1, :5, 5:].any()
    assert sees[:, :3, :3].float().sum() == 2 * 6  # causal in the image
    assert sees.any(-1).all()  # no row without anything to see, which would be no number
    assert block_mask(p, 3, window=2)[0, 5].tolist() == [False] * 4 + [True, True] + [False] * 3


@pytest.mark.parametrize('packing', [True, False])
@pytest.mark.parametrize(
    'architecture', ['blip2-opt', 'blip2-t5', 'instructblip-llama', 'instructblip-t5', 'blip2-gemma3']
)
def test_a_finer_q_former(architecture, packing, folder, small_data):
    """As on a card with a quantised language model: it computes in bf16 and the Q-Former in fp32; the loss is that
    of fp32, nearly, and has gradients"""
    import torch
    from fada.checkpoints import keep_fp32

    name, _, weights = tiny(architecture, folder)
    table = load_table(small_data, ['Femur'], 'train')
    losses = []
    for mixed in (False, True):
        vlm = load(name, weights=weights, device='cpu', precision='fp32', max_new_tokens=4)
        if mixed:
            vlm.core.bfloat16()
            keep_fp32(vlm.core, vlm.spec.fp32_parts)
        torch.manual_seed(0)
        add_lora(vlm, 2)
        m = Material(vlm, small_data, table, LoraRecipe(packing=packing, cache=False))
        loss = m.loss([0, 3])
        loss.backward()
        losses.append(float(loss.detach()))
        assert any(p.grad is not None and p.grad.any() for p in vlm.model.parameters() if p.requires_grad)
    assert (
        {p.dtype for p in vlm.core.qformer.parameters()}
        == {torch.float32}
        != {p.dtype for p in vlm.core.language_model.parameters()}
    )
    assert abs(losses[0] - losses[1]) < 0.03 * losses[0], losses


@pytest.mark.parametrize('architecture', ['blip2-opt', 'blip2-t5', 'instructblip-llama'])
def test_maps_of_a_finer_q_former(architecture, folder):
    "The same model answers and is explained: every method gives a map"
    import numpy as np
    from fada.canary import probe_picture
    from fada.checkpoints import keep_fp32
    from fada.explain import explain, methods

    name, _, weights = tiny(architecture, folder)
    vlm = load(name, weights=weights, device='cpu', precision='fp32', max_new_tokens=4)
    vlm.core.bfloat16()
    keep_fp32(vlm.core, vlm.spec.fp32_parts)
    able = methods(vlm)
    assert {'relevancy', 'raw attention', 'integrated gradients'} <= set(able)
    for m in able:
        if m.startswith('occlusion') and m != 'occlusion, blur':
            continue  # the same passes with another fill
        assert np.isfinite(explain(vlm, probe_picture(64), 'What is it?', 'femur', m).heat).all(), m
