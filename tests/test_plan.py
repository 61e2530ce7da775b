"""What a model takes: arithmetic against the published counts, files saved for true, and torch's own allocator."""

import json, math, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from commands import typed
from fada.loop import LoraRecipe
from fada.checkpoints import ledger, load_model, shard_header, shards
from fada.memory import count_weights, kv_bytes_per_token, published_matrix, weight_bytes
from fada.plan import (
    PARTS,
    PUBLISHED_SPEED,
    dynamic,
    kept_plans,
    measure_model,
    plan,
    plan_table,
    plan_text,
    shape_of,
)
from fada.registry import MODELS, skeleton
from fada.settings import FadaError

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
# Facts: fp16, int8, nf4 (double-quantised) in GiB and KiB a token of cache, by transformers' own rules under fp16
FACTS = {
    'blip2-opt-2.7b': (7.17, 3.91, 2.33, 320),
    'instructblip-flan-t5-xl': (8.5, 5.35, 3.8, 192),
    'llava-1.5-7b': (13.16, 6.83, 3.76, 512),
    'florence-2-base': (0.43, 0.26, 0.18, 18),
    'gemma-3-4b': (8.01, 4.64, 3.01, 136),
    'medgemma-4b': (8.01, 4.64, 3.01, 136),
    'medgemma-4b-text': (7.23, 4.24, 2.79, 136),
    'qwen2.5-vl-3b': (6.99, 3.79, 2.24, 36),
    'qwen3-vl-2b': (3.96, 2.28, 1.46, 112),
}


@pytest.mark.parametrize('name', FACTS)
def test_weights_and_cache_as_published(name):
    spec = MODELS[name]
    model = skeleton(spec)
    # transformers keeps only its query tokens back
    keep = () if name.startswith('instructblip') else spec.fp32_parts
    c = count_weights(model, keep)
    *sizes, kv = FACTS[name]
    for precision, gib in zip(('fp16', 'int8', 'nf4'), sizes):
        assert abs(sum(weight_bytes(c, precision, 'fp16')) / GIB - gib) <= max(0.0051, 0.01 * gib), precision
    assert kv_bytes_per_token(model.config) == kv * 1024 and c.parameters == spec.parameters


def test_the_published_matrix_says_what_each_figure_was():
    got = {(r['model'], r['precision']): float(r['weights'].split()[0]) for r in published_matrix()}
    for key, gb in {
        ('blip2-opt-2.7b', 'int8'): 4.20,
        ('blip2-opt-2.7b', 'fp16'): 7.7,
        ('medgemma-4b', 'int8'): 4.98,
        ('florence-2-large', 'int8'): 0.87,
    }.items():
        assert abs(got[key] - gb) <= 0.011, key
    assert 4.0 <= got['llava-1.5-7b', 'nf4'] <= 4.4
    assert all('GB' in r['weights'] and 'GiB' in r['binary'] and r['was'] for r in published_matrix())


def some(*names):
    "All architectures, those not named marked slow"
    return [a if a in names else pytest.param(a, marks=pytest.mark.slow) for a in tiny.BUILD]


@pytest.mark.parametrize('architecture', some('blip2-t5', 'instructblip-llama', 'gemma3', 'qwen2.5-vl', 'florence2'))
def test_files_saved_for_true_have_the_bytes_of_arithmetic(architecture, tmp_path):
    "Tiny checkpoints loaded by the real loader and saved in each precision: tensors within 1 %"
    name, _, folder = tiny.tiny(architecture, tmp_path)
    spec = MODELS[name]
    c = count_weights(load_model(spec, folder, 'fp32', 'cpu')[0], spec.fp32_parts, spec.trained_parts)
    text = shape_of(spec, folder).get_text_config()
    for precision in spec.precisions:
        model = load_model(spec, folder, precision, 'cpu')[0]
        out = tmp_path / precision
        model.save_pretrained(out)
        saved = sum(
            math.prod(t['shape']) * (1 if t['dtype'] in ('I8', 'U8') else 2 if '16' in t['dtype'] else 4)
            for s in shards(out)
            for n, t in shard_header(s).items()
            if 'bitsandbytes__' not in n
        )  # a JSON note a tensor
        want = sum(weight_bytes(c, precision, 'fp32'))
        if text.model_type == 't5':
            want -= text.vocab_size * text.d_model * (2 if '16' in precision else 4)  # tied in a tiny one
        assert abs(saved / want - 1) < 0.01, (precision, saved, want)


SIDES = {'florence2': 64, 'qwen2.5-vl': 56, 'qwen3-vl': 64}


def measured(architecture, folder, task, **kw):
    _, _, at = tiny.tiny(architecture, folder)
    return measure_model(
        tiny.row(architecture).name,
        task,
        'fp32',
        'cpu',
        random=True,
        config=at,
        keep=False,
        side=SIDES.get(architecture),
        new_tokens=12,
        **kw,
    )


def measured_alone(*args, **kw):
    """The same in a process of its own: in one that ran many tests, torch's profiler sometimes tells of kilobytes
    for megabytes"""
    code = (
        'import json, sys; sys.path.insert(0, sys.argv[1]); import test_plan; from pathlib import Path; a, kw = json.loads(sys.argv[2]); '
        'print(json.dumps(test_plan.measured(a[0], Path(a[1])/"alone", *a[2:], **kw)))'
    )
    out = subprocess.run(
        [sys.executable, '-c', code, str(Path(__file__).parent), json.dumps([[str(a) for a in args], kw])],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return json.loads(out.splitlines()[-1])


CHECKPOINTING, APART = (
    dict(checkpointing=True),
    dict(packing=False, cache=False),
)  # training asks for the first, packs and keeps features by itself


@pytest.mark.parametrize(
    'task,how',
    [
        ('answer', {}),
        ('train', {}),
        pytest.param('train', CHECKPOINTING, marks=pytest.mark.slow),
        pytest.param('train', APART, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('architecture', some('blip2-opt', 'llava', 'smolvlm', 'florence2'))
def test_activations_against_the_allocator(architecture, task, how, tmp_path):
    "Tiny models of every architecture: predicted activations within 15 % of what torch allocated"
    off = lambda r: abs(r['predicted_activation_bytes'] / r['activation_bytes'] - 1)
    r = measured(architecture, tmp_path, task, batch=2, questions=3, **how)
    if off(r) >= 0.15:
        r = measured_alone(architecture, tmp_path, task, batch=2, questions=3, **how)
    assert off(r) < 0.15, r


MID = dict(hidden_size=256, num_hidden_layers=7, intermediate_size=768, num_attention_heads=8)

MIDDLE = {
    'instructblip-llama': ('LLAMA', dict(MID, num_key_value_heads=4)),
    'llava': ('LLAMA', dict(MID, num_key_value_heads=4)),
    'gemma3': ('GEMMA3', dict(MID, layer_types=None)),
    'blip2-t5': ('T5', dict(d_model=256, d_ff=768, d_kv=32, num_heads=8, num_layers=6, num_decoder_layers=6)),
}


@pytest.mark.parametrize(
    'architecture,task,how',
    [
        *((a, t, {}) for a in ('instructblip-llama', 'gemma3', 'blip2-t5') for t in ('answer', 'train')),
        ('llava', 'train', CHECKPOINTING),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ('llava', 'train', {}),
                ('llava', 'train', APART),
                ('gemma3', 'train', CHECKPOINTING),
                ('blip2-t5', 'train', CHECKPOINTING),
            )
        ),
    ],
)
def test_middle_sizes_are_reckoned_from_few_layers(architecture, task, how, tmp_path, monkeypatch):
    "Seven layers predicted from two and three, twelve tokens from four and eight: within 15 %"
    table, mid = MIDDLE[architecture]
    for k, v in mid.items():
        monkeypatch.setitem(getattr(tiny, table), k, v)
    r = measured(architecture, tmp_path, task, batch=2, questions=2, **how)
    assert r['activation_bytes'] > 1e6 and abs(r['predicted_activation_bytes'] / r['activation_bytes'] - 1) < 0.15, r


@pytest.mark.parametrize(
    'name,task,checkpointing',
    [
        ('blip2-opt-2.7b', 'train', False),
        ('llava-1.5-7b', 'train', True),
        pytest.param('smolvlm-256m', 'answer', False, marks=pytest.mark.slow),
    ],
)
def test_few_layers_tell_what_all_take(name, task, checkpointing, monkeypatch):
    "The true depth run on shapes in full, against the reckoning from a few layers: within 1 %"
    from fada import plan as room

    kw = dict(
        precision='bf16',
        half='bf16',
        device='cuda',
        batch=1,
        questions=8,
        side=None,
        prompt=32,
        recipe=LoraRecipe(checkpointing=checkpointing),
    )
    few = dynamic(task, MODELS[name], shape_of(MODELS[name]), 16, **kw)
    monkeypatch.setattr(room, '_SHALLOW', (99, 999))
    monkeypatch.setattr(room, '_SHORT', (16, 17))
    full = dynamic(task, MODELS[name], shape_of(MODELS[name]), 16, **kw)
    assert (
        abs(few.bytes / full.bytes - 1) < 0.01
        and few.trained == full.trained
        and abs(few.flops / full.flops - 1) < 0.05
    )


@pytest.mark.parametrize('architecture,tiles', [('llava', 1), ('smolvlm', 5), ('internvl', 4), ('paligemma', 1)])
def test_a_prefix_kept_once_and_tiles(architecture, tiles, tmp_path, monkeypatch):
    """The engine's own rows: keys and values as planned, to the byte where the stand-in's tokens are all there are;
    activations within 15 %"""
    from fada import decode, plan as room

    name, _, at = tiny.tiny(architecture, tmp_path)
    monkeypatch.setattr(decode, 'SHARE_FROM', 8)
    spec = replace(MODELS[name], tiles=tiles)
    monkeypatch.setattr(room, 'model_spec', lambda n: spec)
    held = []

    class Seen(decode.Rows):
        def step(self):
            out = super().step()
            held.append((self.shared, self.prefix.nbytes + self.slots.nbytes))
            return out

    monkeypatch.setattr('fada.families.Rows', Seen)
    r = measure_model(
        name, 'answer', 'fp32', 'cpu', random=True, config=at, keep=False, questions=4, batch=2, new_tokens=12
    )
    p = plan(name, 'answer', 'fp32', questions=4, batch=2, new_tokens=12, config=at, device='cpu', find=False)
    assert held[-1] == (architecture != 'paligemma', p.parts['KV cache']), p.parts
    assert abs(r['predicted_activation_bytes'] / r['activation_bytes'] - 1) < 0.15, r
    if tiles > 1:
        monkeypatch.setattr(room, 'model_spec', lambda n: MODELS[n])
        assert (
            plan(
                name, 'answer', 'fp32', questions=4, batch=2, new_tokens=12, config=at, device='cpu', find=False
            ).peak_bytes
            < p.peak_bytes
        )


def test_llava_with_eight_questions_within_six_gigabytes():
    "nf4 with double quantisation, the context among it: the image's keys and values lie there once"
    p = plan('llava-1.5-7b', 'answer', 'nf4', gpu='8GiB', questions=8, find=False)
    assert p.peak_bytes < 6e9 and p.verdict == 'fits'
    assert p.parts['KV cache'] == (576 + 8 * (32 + 48)) * kv_bytes_per_token(shape_of(MODELS['llava-1.5-7b']))


def test_training_is_planned_as_it_is_done():
    "Batch, steps and rank are those of `fada train`, and so are the images that are encoded together"
    import inspect
    from fada.finetune import lora_recipe
    from fada.loop import keep_features
    from fada.plan import ENCODED, planned_recipe

    for name in ('blip2-nano', 'llava-1.5-7b', 'blip2-flan-t5-xl'):
        r = lora_recipe(MODELS[name])
        assert planned_recipe(MODELS[name], 'train') == r
        assert (
            planned_recipe(MODELS[name], 'answer').batch == 1
            and plan(name, 'train', 'bf16', find=False).batch == r.batch
        )
    assert inspect.signature(keep_features).parameters['batch'].default == ENCODED


@pytest.mark.parametrize(
    'name,gb,how',
    [
        ('llava-1.5-7b', 6, dict(accumulate=2, checkpointing=True)),
        ('llava-1.5-7b', 6, dict(checkpointing=True)),
        ('blip2-opt-2.7b', 4.5, dict(accumulate=2)),
    ],
)
def test_training_of_four_bits_fits_a_small_card(name, gb, how):
    "The family's step of two images with eight questions each, the context among it"
    p = plan(name, 'train', 'nf4', gpu='8GiB', **how)
    assert (
        p.peak_bytes < gb * 1e9
        and p.verdict == 'fits'
        and (p.batch, p.questions, p.checkpointing) == (2, 8, 'checkpointing' in how)
    )


def test_advice_on_training_keeps_the_step():
    """What does not fit is led to more parts, and to checkpointing where parts do not do; each advice is what a
    plan of it says"""
    p = plan('llava-1.5-7b', 'train', 'nf4', gpu='8GiB')
    assert p.verdict == 'no' and p.nearest
    for f in p.nearest:
        how = {k: f[k] for k in ('batch', 'questions', 'accumulate', 'checkpointing')}
        assert (f['batch'], f['checkpointing']) == (2, True)
        again = plan('llava-1.5-7b', 'train', f['precision'], gpu='8GiB', **how)
        assert (again.verdict, again.peak_bytes) == (f['verdict'], f['peak_bytes'])
    assert '--checkpointing' in plan_text(p)
    whole, parts = (plan('blip2-opt-2.7b', 'train', 'nf4', batch=8, accumulate=a, find=False) for a in (1, 4))
    one = plan('blip2-opt-2.7b', 'train', 'nf4', batch=2, find=False)
    assert parts.peak_bytes == one.peak_bytes < whole.peak_bytes and parts.flops == 4 * one.flops


@pytest.mark.parametrize('checkpointing', [False, True])
def test_steps_of_a_true_training(checkpointing, small_data, tmp_path):
    """The nano on phantoms, kept features, packed, validation answers before: what steps allocate is what the
    preflight reckons, within 15 %"""
    from fada.data import load_table
    from fada.loop import Fit, Material, checkpointed
    from fada.memory import allocator_peak
    from fada.preflight import row_lengths, training_bytes
    from fada.train import add_lora
    from fada.vlm import load

    vlm = load('blip2-nano', device='cpu', precision='fp32')
    add_lora(vlm, 8)
    r = LoraRecipe(batch=8, checkpointing=checkpointing)
    train, val = (
        Material(vlm, small_data, load_table(small_data, ['Femur'], s), r, tmp_path / f'{s}.npy')
        for s in ('train', 'val')
    )
    assert len(train) >= 8 and train.kept and train.packs
    with allocator_peak('cpu') as seen, checkpointed(vlm.core, checkpointing):
        fit = Fit(vlm, r, train, val, '', tmp_path)
        fit.check(0)
        vlm.core.train()
        fit.begin(fit.phases()[-1][1], 2)
        fit.take()
        fit.take()
    said = training_bytes(vlm, r, 8, max(map(len, train.rows)), **row_lengths(train))
    assert abs(said / seen['bytes'] - 1) < 0.15, (said, seen['bytes'])


def test_a_plan_adds_up_and_its_advice_fits():
    p = plan('llava-1.5-7b', 'answer', 'bf16', gpu='8GiB')
    assert sum(p.parts.values()) == p.peak_bytes and tuple(p.parts) == PARTS and p.verdict == 'no' and p.nearest
    for f in p.nearest:
        again = plan('llava-1.5-7b', 'answer', f['precision'], gpu='8GiB', batch=f['batch'], questions=f['questions'])
        assert again.verdict == f['verdict'] != 'no' and again.peak_bytes == f['peak_bytes']
    assert plan('llava-1.5-7b', 'answer', 'bf16', gpu='24GiB').verdict == 'fits'
    none = plan('blip2-flan-t5-xxl', 'answer', 'bf16', gpu='4GiB')
    assert not none.nearest
    assert 'needs a card of' in plan_text(none)
    need = p.peak_bytes + p.reserve_bytes
    assert (p.fits(need), p.fits(need - 1), p.fits(round(need / 0.9) + 1)) == ('tight', 'no', 'fits')


def test_hours_follow_the_one_published_run():
    "BLIP-2 in int8, 5 images with 8 questions in a minute"
    p = plan('blip2-opt-2.7b', 'train', 'int8', batch=1, steps=5, packing=False)  # as it was run
    assert 40 < p.flops * 5 / PUBLISHED_SPEED < 80


def test_bigger_settings_take_more():
    small = plan('smolvlm-256m', 'train', 'bf16', batch=1)
    assert plan('smolvlm-256m', 'train', 'bf16', batch=2).peak_bytes > small.peak_bytes
    a = plan('smolvlm-256m', 'answer', 'bf16')
    b = plan('smolvlm-256m', 'answer', 'bf16', new_tokens=96)
    assert b.parts['KV cache'] - a.parts['KV cache'] == 8 * 48 * kv_bytes_per_token(shape_of(MODELS['smolvlm-256m']))


@pytest.mark.parametrize(
    'words,said',
    [
        (('medgema-4b',), 'did you mean medgemma-4b'),
        (('medgemma-4b', '--precision', 'int4'), 'unknown precision'),
        (('medgemma-4b', '--gpu', '8'), 'a number with its unit'),
        (('medgemma-4b', '--batch', '0'), 'at least 1'),
        (('medgemma-4b', '--config', '{config}'), 'misses vision_config'),
        (('openai',), 'no memory of a card'),
        (('medgemma-4b', '--reserve', 'much'), '--reserve'),
        (('medgemma-4b', '--task', 'learn'), 'unknown task'),
    ],
)
def test_bad_input_is_one_error(words, said, tmp_path):
    from typer.testing import CliRunner
    from fada.cli import app

    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='gemma3', text_config=dict(hidden_size=64))))
    r = CliRunner().invoke(app, ['plan', *[w.format(config=tmp_path / 'config.json') for w in words]])
    assert isinstance(r.exception, FadaError) and said in str(r.exception) and r.stdout == ''


def test_command_gives_the_promised_json():
    r = subprocess.run(
        typed('plan blip2-nano smolvlm-256m --precision bf16 --gpu 8GiB --json'),
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    rows = json.loads(r.stdout)
    assert [(x['model'], x['task']) for x in rows] == [
        (m, t) for m in ('blip2-nano', 'smolvlm-256m') for t in ('answer', 'train')
    ]
    for x in rows:
        assert {'model', 'task', 'precision', 'parameters', 'weights_bytes', 'peak_bytes', 'parts', 'verdict'} <= set(
            x
        )
        assert sum(x['parts'].values()) == x['peak_bytes'] and x['verdict'] == 'fits'
    bad = subprocess.run(typed('plan smolvlm-256m --gpu 8'), capture_output=True, text=True)
    assert (bad.returncode, bad.stdout, len(bad.stderr.strip().splitlines())) == (1, '', 1)


def test_measure_records_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path))
    r = measure_model('blip2-nano', 'train', 'fp32', 'cpu', questions=2)
    assert (
        abs(r['error']) < 0.05
        and r['load_seconds'] > 0
        and r['seconds_per_question'] > 0
        and r['flops_per_second'] > 0
    )
    assert 'measured here' in plan('blip2-nano', 'train', 'fp32', device='cpu').speed
    assert 'published' in plan('blip2-nano', 'train', 'fp32').speed  # a CPU's speed says nothing of a card


def test_weights_of_another_shape_are_not_the_row_s(tmp_path, monkeypatch):
    "Neither a folder of weights nor a configuration is recorded under the row's name"
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path / 'state'))
    name, _, at = tiny.tiny('smolvlm', tmp_path)
    for given in (dict(weights=at), dict(random=True, config=at)):
        r = measure_model(name, 'train', 'fp32', 'cpu', questions=1, **given)
        assert r['flops_per_second'] > 0
    assert not ledger(name) and 'published' in plan(name, 'train', 'fp32', device='cpu').speed


@pytest.mark.parametrize('precision', ['int8', 'nf4'])
def test_a_measured_peak_counts_the_state_of_the_quantisation(precision, tmp_path):
    "Scales, offsets and code books are in the weights measured as they are in those predicted, within 1 %"
    name, _, at = tiny.tiny('llava', tmp_path)
    r = measure_model(name, 'answer', precision, 'cpu', questions=1, new_tokens=4, weights=at, keep=False)
    p = plan(name, 'answer', precision, questions=1, new_tokens=4, config=at, device='cpu', find=False)
    assert (
        p.parts['quantisation state'] > 0.015 * p.weights_bytes
        and abs(r['weights_bytes'] / p.weights_bytes - 1) < 0.01
    ), r
    assert r['peak_bytes'] == r['weights_bytes'] + r['activation_bytes']


def test_the_clock_waits_for_a_card(monkeypatch):
    "What a card was given is done before the clock is read, at both ends; a stand-in for the card that is not here"
    import torch
    from fada.plan import _clock

    seen = []
    monkeypatch.setattr(torch.cuda, 'synchronize', seen.append)
    monkeypatch.setattr('time.perf_counter', lambda: len(seen))
    assert (_clock('cpu'), _clock('cuda:1'), _clock('cuda')) == (0, 1, 2) and seen == ['cuda:1', 'cuda']


def fresh(names):
    "Kept plans of `names` with their freshly predicted peaks"
    kept = {(p.model, p.task, p.precision): p for p in kept_plans()}
    return [
        (p, plan(*k, gpu='8GiB', batch=1, checkpointing=k[1] == 'train', find=False))
        for k, p in kept.items()
        if k[0] in names
    ]


def test_readme_and_kept_plans_are_current():
    """README's table is made of plans.json, which holds every local model; three are predicted anew (more: slow
    test)"""
    assert plan_table(kept_plans()) in (ROOT / 'README.md').read_text(), 'run python tests/plans.py and make readme'
    assert {p.model for p in kept_plans()} == {m.name for m in MODELS.values() if m.architecture}
    for old, new in fresh(('blip2-nano', 'smolvlm-256m', 'blip2-opt-2.7b')):
        _same(old, new)


def _same(old, new):
    assert abs(old.peak_bytes / new.peak_bytes - 1) < 0.005, (
        f'{old.model} {old.task} {old.precision}: run python tests/plans.py'
    )


@pytest.mark.slow
def test_kept_plans_of_each_architecture_are_current():
    "One model an architecture; those whose dry run takes longest are left to tests/plans.py"
    slow = ('qwen2.5-vl', 'instructblip-t5', 'instructblip-llama', 'gemma3-text')
    names = [tiny.row(a).name for a in tiny.BUILD if a not in slow]
    for old, new in fresh(names):
        _same(old, new)


def test_a_peak_is_ones_own():
    "What the program held that started this one does not count"
    import subprocess
    import sys

    code = (
        "import subprocess, sys\nheld = b'1'*(400<<20)\n"
        "print(subprocess.run([sys.executable, '-c', 'from fada.memory import peak_bytes; print(peak_bytes()); x = b\"1\"*(150<<20); print(peak_bytes())'],"
        " capture_output=True, text=True, check=True).stdout)"
    )
    first, then = map(
        int, subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert first < 200 << 20 and 150 << 20 <= then - first + (5 << 20) < 200 << 20
