"""One image with eight questions, and a table of images with eight questions each: the engine against the plain
loop.

The baseline is what public pipelines for this task do: one processor call and one `generate` per question; beside
it stands a plain batched `generate` at the engine's batch size. Answers are compared token by token, and how many
agree is reported (the exact test, with its tie of 1e-4 between the two best logits, is tests/test_engine.py). Same
model, same dtype, same threads, questions of 30 tokens, exactly 12 new tokens, greedy, cache on; best of up to five
runs that alternate, because machines are noisy, at least two, and no new one after `--seconds`. On a table the loop
and the batched `generate` are timed on as many of its first images as take the loop some seconds, and reckoned for
all: what they take for an image does not change with the number of images. Peak memory is that of torch's allocator
on one image, beside what `fada plan` says. A model that is not on this machine (mini: `fada models get blip2-mini`)
is left out, and said to be.

Writes bench/results/engine-<processor>-<threads>.json unless --quick; a full run takes under 12 minutes on 2 cores.

    python bench/engine.py --json
    FADA_THREADS=1 OMP_NUM_THREADS=1 python bench/engine.py --json
"""

import argparse, json, os, platform, re, sys, tempfile, time
from contextlib import contextmanager
import numpy as np
from fada.decode import finish
from fada.memory import peak_bytes
from pathlib import Path
from fada.settings import environment, write_json
from fada.vlm import build_prompt, load, reference_said

TOKENS, NEW = 30, 12  # of a question with its prompt (or more, where the prompt alone is longer); of an answer
PLACES = (
    'head',
    'spine',
    'heart',
    'stomach',
    'femur',
    'cord',
    'liver',
    'bladder',
    'lips',
    'kidney',
    'aorta',
    'cortex',
)


def words_of(tok, n: int, k: int) -> str:
    "A question of about `n` tokens, another one for every `k`"
    words = []
    while len(tok(' '.join(words))['input_ids']) < n:
        words.append(PLACES[(k + 3 * len(words) + len(words) * k) % len(PLACES)])
    return ' '.join(words[:-1] or words)


def questions(vlm, n: int) -> list:
    "`n` questions whose prompts have about 30 tokens"
    tok = getattr(vlm.processor, 'tokenizer', vlm.processor)
    frame = len(tok(build_prompt(vlm.spec, 'x'))['input_ids']) - 1
    return [f'{k} {words_of(tok, max(4, TOKENS - frame - 2), k)}' for k in range(n)]


def pictures(side: int, n: int) -> list:
    return list(np.random.default_rng(0).integers(0, 255, (n, side, side, 3), dtype=np.uint8))


# ---- models
def forced(vlm):
    "Exactly 12 new tokens: random models never stop, trained ones are not asked whether they would"
    import torch

    torch.set_num_threads(int(os.environ.get('FADA_THREADS') or os.cpu_count()))
    vlm.max_new_tokens = NEW
    for m in (vlm.core, getattr(vlm.core, 'language_model', vlm.core)):
        if hasattr(m, 'generation_config'):
            m.generation_config.eos_token_id = None
    return vlm


def nano():
    return forced(load('blip2-nano', device='cpu', precision='fp32')), 112


def mini():
    return forced(load('blip2-mini', device='cpu', precision='fp32')), 224


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

    tok = load('blip2-nano', device='cpu', precision='fp32').processor.tokenizer
    torch.manual_seed(0)
    vision = dict(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=224,
        patch_size=16,
        initializer_range=0.05,
    )
    qformer = dict(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        encoder_hidden_size=384,
        vocab_size=len(tok),
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    text = dict(
        model_type='opt',
        hidden_size=512,
        word_embed_proj_dim=512,
        ffn_dim=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=len(tok),
        max_position_embeddings=512,
        init_std=0.08,
        dropout=0.0,
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    m = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=vision,
            qformer_config=qformer,
            text_config=text,
            num_query_tokens=32,
            image_token_index=tok.convert_tokens_to_ids('<image>'),
        )
    )
    with torch.no_grad():
        m.query_tokens.normal_(0, 0.5)
    return wrap(
        'blip2-opt-2.7b',
        m,
        Blip2Processor(BlipImageProcessorPil(size=dict(height=224, width=224)), tok, num_query_tokens=32),
    ), 224


def llava():
    "LLaVA-shaped, random: 576 image tokens, ViT 6 × 384 at 336 px, Llama 8 × 512"
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tok = load('blip2-nano', device='cpu', precision='fp32').processor.tokenizer
    torch.manual_seed(0)
    image = tok.convert_tokens_to_ids('<image>')
    tok.chat_template = (
        "{% for m in messages %}USER: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}"
        "{{ p['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
    )
    vision = dict(
        model_type='clip_vision_model',
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=336,
        patch_size=14,
    )
    text = dict(
        model_type='llama',
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=len(tok),
        max_position_embeddings=2048,
        initializer_range=0.06,
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    m = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=576)
    )
    ip = CLIPImageProcessorPil(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336))
    return wrap(
        'llava-1.5-7b',
        m,
        LlavaProcessor(
            ip,
            tok,
            patch_size=14,
            vision_feature_select_strategy='default',
            num_additional_image_tokens=1,
            chat_template=tok.chat_template,
        ),
    ), 336


MODELS = dict(nano=nano, mid=mid, llava=llava, mini=mini)


# ---- ways
def loop(vlm, images, asked):
    "One processor call and one `generate` per question"
    return [reference_said(vlm, im, q)[0] for im in images for q in asked]


def batched(vlm, images, asked, most=16):
    "A plain `generate` over the same rows at the engine's batch size: every row brings its image"
    import torch

    out = []
    tok = getattr(vlm.processor, 'tokenizer', vlm.processor)
    for k in range(0, len(images), most):
        rows = [(im, build_prompt(vlm.spec, q)) for im in images[k : k + most] for q in asked]
        if hasattr(vlm, 'inputs'):
            from PIL import Image

            t = vlm.inputs([Image.fromarray(im) for im, _ in rows], [vlm.render(p, True)[0] for _, p in rows])
        else:
            t = vlm.processor(
                images=[im for im, _ in rows], text=[p for _, p in rows], return_tensors='pt', padding=True
            ).to(vlm.core.device)
        with torch.inference_mode():
            g = vlm.core.generate(**t, max_new_tokens=NEW, do_sample=False, pad_token_id=tok.pad_token_id)
        out += g[:, -NEW:].tolist()
    return out


def engine_(vlm, images, asked, cached=False, most=16):
    "The engine, nothing kept from before unless `cached`"
    if not cached:
        vlm._features.clear()
        vlm._ids.clear()
    out = []
    for k in range(0, len(images), most):
        part = images[k : k + most]
        at = [n for n in range(len(part)) for _ in asked]
        out += [
            ids for ids, _ in vlm.said(vlm.see(part), at, [build_prompt(vlm.spec, q) for _ in part for q in asked])
        ]
    return out


def cached(vlm, images, asked):
    return engine_(vlm, images, asked, True)


def race(ways: dict, times: int, seconds: float) -> tuple:
    """(best wall and processor seconds of each way, their outputs, runs): runs alternate, at least two, no new one
    after `seconds`"""
    best, out, start = {k: [np.inf] * 2 for k in ways}, {}, time.perf_counter()
    for n in range(times):
        if n >= min(2, times) and time.perf_counter() - start > seconds:
            return best, out, n
        for k, f in ways.items():
            w, c = time.perf_counter(), time.process_time()
            out[k] = f()
            best[k] = [min(best[k][0], time.perf_counter() - w), min(best[k][1], time.process_time() - c)]
    return best, out, times


# ---- what the machine can do
def limits() -> dict:
    """Arithmetic and memory bandwidth of this machine with these threads, measured now: GFLOP/s of the faster
    matrix library, GB/s"""
    import torch
    from fada.linears import best_seconds, onednn_gains, onednn_linear

    x, w, big = torch.randn(512, 1024), torch.randn(1024, 1024), torch.randn(64_000_000)
    with torch.inference_mode():
        f = onednn_linear if onednn_gains() else torch.nn.functional.linear
        return dict(
            gflops=2 * 512 * 1024 * 1024 / best_seconds(lambda: f(x, w)) / 1e9,
            gbytes=big.nbytes / best_seconds(lambda: big.sum()) / 1e9,
            library='oneDNN' if onednn_gains() else 'MKL',
        )


def linear_size(module, but=()) -> int:
    "Weights of the linear layers in `module`"
    import torch

    return sum(
        m.weight.numel()
        for n, m in module.named_modules()
        if isinstance(m, torch.nn.Linear) and not any(b in n for b in but)
    )


def shape(vlm, asked) -> dict:
    "Weights of vision (with Q-Former) and language model, tokens of patches, prefix and question"
    words = vlm.words()
    text = linear_size(words.decoder)
    side = vlm.core.config.vision_config
    patches = (side.image_size // side.patch_size) ** 2 + 1
    head = words.head.weight.numel() if hasattr(words.head, 'weight') else 0
    tok = getattr(vlm.processor, 'tokenizer', vlm.processor)
    chat = hasattr(vlm, 'render')
    q = max(
        len(tok(vlm.render(p, False)[0] if chat else p)['input_ids'])
        for p in (build_prompt(vlm.spec, x) for x in asked)
    )
    eyes = linear_size(vlm.core) - text - (linear_size(vlm.core.language_model) - text if not chat else head)
    return dict(vision=eyes, text=text, head=head, patches=patches, prefix=vlm.image_tokens(), question=q)


def bound(s: dict, n: int) -> dict:
    """By counting multiplications alone: how much less the engine does than a loop, for `n` questions of one image.
    Decode counts the same in both here; on hardware that waits for memory it is cheaper in a batch, so the ratio
    may be exceeded"""
    eye = s['vision'] * s['patches']
    p, q = s['prefix'] * s['text'], s['question'] * s['text']
    d = NEW * (s['text'] + s['head'])
    return {
        'arithmetic': n * (eye + p + q + d) / (eye + p + n * (q + d)),
        'without decode': n * (eye + p + q) / (eye + p + n * q),
    }


@contextmanager
def clock(spent: dict, name: str):
    t = time.perf_counter()
    yield
    spent[name] = spent.get(name, 0) + time.perf_counter() - t


def shares(vlm, images, asked, s: dict, top: dict) -> dict:
    """Time of pixels, vision with prefix, questions and decode in one run, and what was reached of the machine's
    limits"""
    import torch
    from fada.linears import quick_linears

    spent = {}
    vlm._features.clear()
    rows = len(images) * len(asked)
    at = [n for n in range(len(images)) for _ in asked]
    prompts = [build_prompt(vlm.spec, q) for _ in images for q in asked]
    with clock(spent, 'pixels'):
        if hasattr(vlm, 'inputs'):
            seen = vlm.see(images)
            for im in seen:
                vlm.inputs([im], [vlm.render(prompts[0], True)[0]])
        else:
            from fada.vlm import pixel_values

            pixel_values(vlm, images)
    with torch.inference_mode(), quick_linears(vlm.core):
        with clock(spent, 'vision and prefix'):
            steps = vlm.begin(vlm.see(images), at, prompts, NEW)
        with clock(spent, 'questions'):
            steps.step()
        with clock(spent, 'decode'):
            finish(steps)
    spent['vision and prefix'] = max(0, spent['vision and prefix'] - spent['pixels'])
    total = sum(spent.values())
    flops = 2 * (
        len(images) * (s['vision'] * s['patches'] + s['prefix'] * s['text']) + rows * s['question'] * s['text']
    )
    bytes_ = (NEW - 1) * 4 * (s['text'] + s['head'])
    return dict(
        seconds=spent,
        shares={k: v / total for k, v in spent.items()},
        of_arithmetic=flops / (spent['vision and prefix'] + spent['questions']) / 1e9 / top['gflops'],
        decode_of_arithmetic=2 * rows * (NEW - 1) * (s['text'] + s['head']) / spent['decode'] / 1e9 / top['gflops'],
        decode_of_bandwidth=bytes_ / spent['decode'] / 1e9 / top['gbytes'],
    )


# ---- the report
def agree(vlm, images, asked, out) -> dict:
    "How many answers of each way are the loop's, token by token"
    return {k: sum(a == b for a, b in zip(v, out['loop'])) for k, v in out.items()} | dict(of=len(out['loop']))


def use(vlm, images, asked, times: int, loop_images: int = None, seconds: float = np.inf) -> dict:
    """Times, ratios and agreement of all ways on one use; loop and batched `generate` on the first `loop_images`,
    reckoned for all"""
    for f in (loop, batched, engine_):
        f(vlm, images[:1], asked)  # what is done once is not timed
    few = images[:loop_images]
    more = len(images) / len(few)
    ways = dict(
        loop=lambda: loop(vlm, few, asked),
        batched=lambda: batched(vlm, few, asked),
        engine=lambda: engine_(vlm, images, asked),
    )
    if len(images) == 1:
        ways['cached'] = lambda: cached(vlm, images, asked)
    best, out, runs = race(ways, times, seconds)
    same = agree(vlm, images, asked, out)
    for k in ('loop', 'batched'):
        best[k] = [more * t for t in best[k]]
    ratio = lambda i: {
        'engine': best['loop'][i] / best['engine'][i],
        'against batched generate': best['batched'][i] / best['engine'][i],
        **({'features cached': best['loop'][i] / best['cached'][i]} if 'cached' in best else {}),
    }
    return dict(
        ratios=ratio(0),
        ratios_of_processor_time=ratio(1),
        seconds={k: b[0] for k, b in best.items()},
        same_tokens=same,
        loop_images=len(few),
        runs=runs,
    )


def against_plan(vlm, images, asked, s: dict) -> dict:
    "Peak of torch's allocator on one use, weights included, and what a plan of the same shape says"
    from fada.checkpoints import held_bytes
    from fada.memory import allocator_peak
    from fada.plan import plan

    vlm._features.clear()
    with allocator_peak('cpu') as a:
        engine_(vlm, images, asked)
    with tempfile.TemporaryDirectory() as d:
        vlm.core.config.save_pretrained(d)
        p = plan(
            vlm.spec.name,
            'answer',
            'fp32',
            questions=len(asked),
            batch=len(images),
            new_tokens=NEW,
            config=d,
            device='cpu',
            prompt=s['question'],
            find=False,
        )
    peak = held_bytes(vlm.core) + a['bytes']
    return dict(
        peak_bytes=peak,
        predicted_bytes=p.peak_bytes,
        ratio=p.peak_bytes / peak,
        activations_ratio=(p.peak_bytes - p.weights_bytes) / a['bytes'],
    )


def growth(vlm, side: int, most: tuple) -> dict:
    """Milliseconds a question as questions of one image grow, and as images grow (to each of `most`); resident
    memory with the latter"""
    from fada.linears import best_seconds
    from fada.memory import resident_bytes

    one = pictures(side, 1)
    out = dict(questions={}, images={})
    for n in (1, 2, 4, 8, 16, 32):
        asked = questions(vlm, n)
        out['questions'][n] = best_seconds(lambda: engine_(vlm, one, asked), 3) * 1e3 / n
    asked = questions(vlm, 8)
    for n in most:
        t = time.perf_counter()
        part = pictures(side, min(n, 100))
        for k in range(0, n, len(part)):
            engine_(vlm, part[: n - k], asked)
        out['images'][n] = dict(ms=(time.perf_counter() - t) * 1e3 / n / 8, resident_mib=resident_bytes() / 2**20)
    return out


LOOP_SECONDS = 8  # that the loop is given on a table, once
GROW_SECONDS = 20  # that the longest of the tables that grow may take
FLOORS = dict(
    nano=(7, 10, 9), mid=(6.5, 10, 7), llava=(4.5, None, 5), mini=(4.5, None, 5)
)  # one image, its features cached, table


def measure(name: str, quick: bool, times: int, seconds: float, loop_images: int = None) -> dict:
    "Everything about one model"
    vlm, side = MODELS[name]()
    asked = questions(vlm, 8)
    s = shape(vlm, asked)
    top = limits()
    one = pictures(side, 1)
    table = pictures(side, (16 if name == 'nano' else 4) if quick else 64)
    first = use(vlm, one, asked, max(3, times), seconds=seconds)
    few = loop_images or min(len(table), max(2, int(LOOP_SECONDS / first['seconds']['loop'])))
    all_ = use(vlm, table, asked, times, few, seconds)
    each = all_['seconds']['engine'] / len(table)
    sizes = [n for n in ((10, 30, 100) if quick else (10, 100, 1000)) if n * each < GROW_SECONDS or n == 10]
    return dict(
        shape=s,
        machine_limits=top,
        bound=bound(s, 8),
        one_image=first,
        table=dict(images=len(table), **all_),
        floors=dict(zip(('one image', 'features cached', 'table'), FLOORS[name])),
        plan=against_plan(vlm, one, asked, s),
        engine=dict(one_image=shares(vlm, one, asked, s, top), table=shares(vlm, table[:16], asked, s, top)),
        peak_bytes=peak_bytes(),
        **({} if quick and name != 'nano' else dict(growth=growth(vlm, side, sizes))),
    )


def missing(name: str) -> str:
    "Why a model cannot be measured here; '' where it can"
    from fada.checkpoints import check_checkpoint, locate
    from fada.registry import model_spec
    from fada.settings import FadaError

    if name != 'mini':
        return ''
    try:
        check_checkpoint(locate(model_spec('blip2-mini')), None)
    except FadaError as e:
        return str(e)
    return ''


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='fewer repetitions, smaller tables')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    p.add_argument('--models', default=','.join(MODELS), help='default: %(default)s')
    p.add_argument(
        '--times', type=int, help='runs of each way; default: 5, with --quick 1 on the table and 3 on one image'
    )
    p.add_argument(
        '--seconds', type=float, default=30, help='no new run of a use after so many; default: %(default)s'
    )
    p.add_argument(
        '--loop-images',
        type=int,
        help=f'images of the table that loop and batched `generate` are timed on; default: {LOOP_SECONDS} s of the loop',
    )
    p.add_argument('--out', help='folder of the result; default: bench/results, with --quick none')
    a = p.parse_args()
    found, left_out = {}, {}
    load_before = os.getloadavg() if hasattr(os, 'getloadavg') else None
    for name in a.models.split(','):
        if name not in MODELS:
            p.error(f'no model {name!r}: one of {", ".join(MODELS)}')
        if why := missing(name):
            left_out[name] = why
            print(f'{name} is left out: {why}', file=sys.stderr)
            continue
        found[name] = measure(name, a.quick, a.times or (1 if a.quick else 5), a.seconds, a.loop_images)
        if not a.json:
            tell(name, found[name])
    import torch

    if not found:
        p.error('no model is left to measure')
    ratios = {
        f'{n}, {k}': f[u]['ratios'][w]
        for n, f in found.items()
        for k, u, w in (
            ('one image', 'one_image', 'engine'),
            ('features cached', 'one_image', 'features cached'),
            ('table', 'table', 'engine'),
            ('one image, against batched generate', 'one_image', 'against batched generate'),
        )
    }
    threads = torch.get_num_threads()
    machine = f"{processor()}, {environment()['cores']} cores"
    out = dict(
        ratios=ratios,
        baseline='one processor call and one `generate` per question, same model, same answers',
        models=found,
        left_out=left_out,
        threads=threads,
        versions=environment(),
        machine=machine,
        load_average=[load_before, os.getloadavg()] if load_before else None,
    )
    folder = Path(a.out) if a.out else None if a.quick else Path(__file__).parent / 'results'
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r'\W+', '-', f'engine {machine} {threads} threads').strip('-')
        write_json(folder / f'{name}.json', out)
    if a.json:
        print(json.dumps(out, indent=1))


def processor() -> str:
    "The processor's model"
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*:\s*(.+)', info.read_text()) if info.is_file() else ()
    return re.sub(r'\((R|TM)\)', '', names[0]).strip() if names else platform.processor() or platform.machine()


def tell(name, f):
    "One model in a few lines"
    floor = f['floors']
    for title, u, low in (
        ('one image', f['one_image'], floor['one image']),
        (f"{f['table']['images']} images", f['table'], floor['table']),
    ):
        r, c, s = u['ratios'], u['ratios_of_processor_time'], u['same_tokens']
        cached = (
            f"features cached {r['features cached']:.1f} (asked: {floor['features cached']}); "
            if 'features cached' in r
            else ''
        )
        print(
            f"{name}, {title} × 8: loop {1000 * u['seconds']['loop']:.0f} ms, engine {1000 * u['seconds']['engine']:.0f} ms, "
            f"{r['engine']:.1f} times (asked: {low}; processor time {c['engine']:.1f}); {cached}against batched "
            f"generate {r['against batched generate']:.1f}; same tokens {s['engine']} of {s['of']}"
        )
    e = f['engine']['one_image']
    print(
        f"  bound by arithmetic {f['bound']['arithmetic']:.1f} ({f['bound']['without decode']:.1f} without decode); "
        + ', '.join(f'{k} {v:.0%}' for k, v in e['shares'].items())
        + f"; prefill at {e['of_arithmetic']:.0%} of {f['machine_limits']['gflops']:.0f} GFLOP/s, decode at {e['decode_of_bandwidth']:.0%} of "
        f"{f['machine_limits']['gbytes']:.0f} GB/s"
    )
    print(
        f"  peak {f['plan']['peak_bytes'] / 2**20:.0f} MiB, {100 * f['plan']['ratio']:.0f} % of it predicted (what comes and goes: "
        f"{100 * f['plan']['activations_ratio']:.0f} %)"
    )
    if 'growth' in f:
        print(
            '  ms a question:',
            ', '.join(f'{n} questions {v:.1f}' for n, v in f['growth']['questions'].items()),
            '|',
            ', '.join(
                f"{n} images {v['ms']:.1f} ({v['resident_mib']:.0f} MiB)" for n, v in f['growth']['images'].items()
            ),
        )


if __name__ == '__main__':
    sys.exit(main())
