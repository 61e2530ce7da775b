"""One image with eight questions, and a table of images with eight questions each: the engine against the plain loop.

The baseline is what public pipelines for this task do: one processor call and one `generate` per question; beside it stands
a plain batched `generate` at the engine's batch size. All give the same tokens, which is asserted (a difference is allowed
where the two best logits are equal to 1e-4). Same model, same dtype, same threads, questions of 30 tokens, exactly 12 new
tokens, greedy, cache on; best of several runs that alternate, because machines are noisy.

    FADA_THREADS=1 OMP_NUM_THREADS=1 python bench/engine.py --quick --json
"""
import argparse, json, os, sys, time
from contextlib import contextmanager
import numpy as np
from fada.decode import Rows, finish
from fada.memory import peak_bytes
from fada.settings import environment
from fada.vlm import build_prompt, load, reference_said

TOKENS, NEW = 30, 12   # of a question with its prompt (or more, where the prompt alone is longer); of an answer
PLACES = ('head', 'spine', 'heart', 'stomach', 'femur', 'cord', 'liver', 'bladder', 'lips', 'kidney', 'aorta', 'cortex')

def words_of(tok, n:int, k:int)->str:
    "A question of about `n` tokens, another one for every `k`"
    words = []
    while len(tok(' '.join(words))['input_ids']) < n: words.append(PLACES[(k+3*len(words)+len(words)*k) % len(PLACES)])
    return ' '.join(words[:-1] or words)

def questions(vlm, n:int)->list:
    "`n` questions whose prompts have about 30 tokens"
    tok = getattr(vlm.processor, 'tokenizer', vlm.processor); frame = len(tok(build_prompt(vlm.spec, 'x'))['input_ids'])-1
    return [f'{k} {words_of(tok, max(4, TOKENS-frame-2), k)}' for k in range(n)]

def pictures(side:int, n:int)->list: return list(np.random.default_rng(0).integers(0, 255, (n, side, side, 3), dtype=np.uint8))

# ---- models -------------------------------------------------------------------------------------------------------------
def forced(vlm):
    "Exactly 12 new tokens: random models never stop, trained ones are not asked whether they would"
    import torch
    torch.set_num_threads(int(os.environ.get('FADA_THREADS') or os.cpu_count()))
    vlm.max_new_tokens = NEW
    for m in (vlm.core, getattr(vlm.core, 'language_model', vlm.core)):
        if hasattr(m, 'generation_config'): m.generation_config.eos_token_id = None
    return vlm

def nano(): return forced(load('blip2-nano', device='cpu', precision='fp32')), 112
def mini(): return forced(load('blip2-mini', device='cpu', precision='fp32')), 224

def wrap(spec, model, processor):
    "A model made here behind the engine of its family"
    from fada.registry import model_spec
    from fada.vlm import engine
    spec = model_spec(spec)
    return forced(engine(spec)(spec, model.eval(), processor, 'random', 'fp32', 'cpu', NEW))

def mid():
    "BLIP-2, random: ViT 12 × 384 at 224 px, Q-Former 6 × 384, OPT 6 × 512"
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    tok = load('blip2-nano', device='cpu', precision='fp32').processor.tokenizer; torch.manual_seed(0)
    vision = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=16,
                  initializer_range=.05)
    qformer = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, encoder_hidden_size=384,
                   vocab_size=len(tok), initializer_range=.05, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    text = dict(model_type='opt', hidden_size=512, word_embed_proj_dim=512, ffn_dim=2048, num_hidden_layers=6, num_attention_heads=8,
                vocab_size=len(tok), max_position_embeddings=512, init_std=.08, dropout=0., pad_token_id=tok.pad_token_id,
                bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    m = Blip2ForConditionalGeneration(Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=32,
                                                  image_token_index=tok.convert_tokens_to_ids('<image>')))
    with torch.no_grad(): m.query_tokens.normal_(0, .5)
    return wrap('blip2-opt-2.7b', m, Blip2Processor(BlipImageProcessorPil(size=dict(height=224, width=224)), tok, num_query_tokens=32)), 224

def llava():
    "LLaVA-shaped, random: 576 image tokens, ViT 6 × 384 at 336 px, Llama 8 × 512"
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    tok = load('blip2-nano', device='cpu', precision='fp32').processor.tokenizer; torch.manual_seed(0)
    image = tok.convert_tokens_to_ids('<image>')
    tok.chat_template = ("{% for m in messages %}USER: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}"
                         "{{ p['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}")
    vision = dict(model_type='clip_vision_model', hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
                  image_size=336, patch_size=14)
    text = dict(model_type='llama', hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=8, vocab_size=len(tok), max_position_embeddings=2048, initializer_range=.06,
                pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    m = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=576))
    ip = CLIPImageProcessorPil(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336))
    return wrap('llava-1.5-7b', m, LlavaProcessor(ip, tok, patch_size=14, vision_feature_select_strategy='default',
                                                  num_additional_image_tokens=1, chat_template=tok.chat_template)), 336

MODELS = dict(nano=nano, mid=mid, llava=llava, mini=mini)

# ---- ways ---------------------------------------------------------------------------------------------------------------
def loop(vlm, images, asked):
    "One processor call and one `generate` per question"
    return [reference_said(vlm, im, q)[0] for im in images for q in asked]

def batched(vlm, images, asked, most=16):
    "A plain `generate` over the same rows at the engine's batch size: every row brings its image"
    import torch
    out = []; tok = getattr(vlm.processor, 'tokenizer', vlm.processor)
    for k in range(0, len(images), most):
        rows = [(im, build_prompt(vlm.spec, q)) for im in images[k:k+most] for q in asked]
        if hasattr(vlm, 'inputs'):
            from PIL import Image
            t = vlm.inputs([Image.fromarray(im) for im,_ in rows], [vlm.render(p, True)[0] for _,p in rows])
        else: t = vlm.processor(images=[im for im,_ in rows], text=[p for _,p in rows], return_tensors='pt', padding=True)
        with torch.inference_mode(): g = vlm.core.generate(**t, max_new_tokens=NEW, do_sample=False, pad_token_id=tok.pad_token_id)
        out += g[:,-NEW:].tolist()
    return out

def engine_(vlm, images, asked, cached=False, most=16):
    "The engine, nothing kept from before unless `cached`"
    if not cached: vlm._features.clear()
    out = []
    for k in range(0, len(images), most):
        part = images[k:k+most]; at = [n for n in range(len(part)) for _ in asked]
        out += [ids for ids,_ in vlm.said(vlm.see(part), at, [build_prompt(vlm.spec, q) for _ in part for q in asked])]
    return out

def cached(vlm, images, asked): return engine_(vlm, images, asked, True)

def race(ways:dict, times:int)->dict:
    "Best wall and processor seconds of each way, in runs that alternate; the ways' outputs"
    out = {k: f() for k,f in ways.items()}; best = {k: [np.inf]*2 for k in ways}
    for _ in range(times):
        for k,f in ways.items():
            w,c = time.perf_counter(),time.process_time(); f()
            best[k] = [min(best[k][0], time.perf_counter()-w), min(best[k][1], time.process_time()-c)]
    return best, out
