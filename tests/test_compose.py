"Compositions from parts that are too large for here, with small ones in their place."

from fada.settings import FadaError
from fada.registry import MODELS


def test_blip2_eyes_with_other_words(monkeypatch):
    """Vision tower, Q-Former and language model are those given, the bridge is new and fits, all is bf16; only the
    missing part is downloaded"""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from fada import checkpoints, compose

    torch.manual_seed(0)
    blip, processor = checkpoints.load_model(MODELS['blip2-nano'])
    words = LlamaForCausalLM(
        LlamaConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=900)
    )
    given, brought, kept = (
        {'blip2-opt-2.7b': (blip, processor), 'medgemma-4b-text': (words, processor.tokenizer)},
        [],
        {},
    )

    def locate(spec):
        if spec.name != 'blip2-opt-2.7b':
            raise FadaError('not here', spec.name, '', '')

    def save(spec, model, processor, parts):
        kept.update(model=model, processor=processor, parts=parts)
        return 'entry'

    monkeypatch.setattr(checkpoints, 'locate', locate)
    monkeypatch.setattr(compose, '_save_composed', save)
    monkeypatch.setattr(compose, 'load_model', lambda spec, **kw: given[spec.name])
    monkeypatch.setattr(compose, 'download', lambda spec, say: brought.append(spec.name))
    assert compose.make_medgemma(MODELS['blip2-medgemma-4b']) == 'entry'
    model = kept['model']
    assert brought == ['medgemma-4b-text'] and kept['parts'] == MODELS['blip2-medgemma-4b'].parts
    assert model.language_model is words and model.vision_model is blip.vision_model and model.qformer is blip.qformer
    assert tuple(model.language_projection.weight.shape) == (48, blip.config.qformer_config.hidden_size)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert kept['processor'].num_query_tokens == blip.config.num_query_tokens
    assert kept['processor'].image_processor.size['height'] == processor.image_processor.size['height']


def test_a_llama_comes_whole_out_of_a_gguf(tmp_path):
    """Weights and words of a tiny GGUF in SmolLM2's layout: what the graph computes with is what was written,
    queries and keys in their order"""
    import gguf, numpy as np
    from fada.compose import smollm2_from_gguf

    width, heads, letters = 16, 2, [chr(c) for c in range(97, 123)]
    tokens = ['<|im_start|>', '<|im_end|>', *letters, 'ab']
    n = len(tokens)
    path = tmp_path / 'tiny.gguf'
    w = gguf.GGUFWriter(str(path), 'llama')
    rng = np.random.default_rng(0)
    w.add_block_count(1)
    w.add_context_length(32)
    w.add_embedding_length(width)
    w.add_feed_forward_length(32)
    w.add_head_count(heads)
    w.add_head_count_kv(heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(1e4)
    w.add_rope_dimension_count(width // heads)
    w.add_vocab_size(n)
    w.add_tokenizer_model('gpt2')
    w.add_token_list(tokens)
    w.add_token_types([3, 3] + [1] * (n - 2))
    w.add_token_merges(['a b'])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    written = {}
    for name, shape in (
        ('token_embd', (n, width)),
        ('output_norm', (width,)),
        ('blk.0.attn_norm', (width,)),
        ('blk.0.ffn_norm', (width,)),
        *((f'blk.0.attn_{k}', (width, width)) for k in ('q', 'k', 'v', 'output')),
        ('blk.0.ffn_gate', (32, width)),
        ('blk.0.ffn_up', (32, width)),
        ('blk.0.ffn_down', (width, 32)),
    ):
        written[name] = rng.normal(0, 0.3, shape).astype(np.float32)
        w.add_tensor(f'{name}.weight', written[name])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    model, tokenizer = smollm2_from_gguf(path)
    layer = model.model.layers[0]
    for mine, name in (
        (model.model.embed_tokens, 'token_embd'),
        (layer.self_attn.v_proj, 'blk.0.attn_v'),
        (layer.mlp.down_proj, 'blk.0.ffn_down'),
        (model.model.norm, 'output_norm'),
    ):
        assert np.allclose(mine.weight.detach().numpy(), written[name], atol=1e-6), name
    # GGUF pairs neighbours, transformers halves
    q = written['blk.0.attn_q'].reshape(heads, width // heads // 2, 2, width).swapaxes(1, 2).reshape(width, width)
    assert np.allclose(layer.self_attn.q_proj.weight.detach().numpy(), q, atol=1e-6)
    assert tokenizer('abc')['input_ids'] == [tokens.index('ab'), tokens.index('c')] and not model.training
