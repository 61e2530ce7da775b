"""What is made of results: twins through a local and a remote model, the preset of 45, examples in the prompt,
answers from elsewhere side by side, people beside models, the list of runs, the paper."""

import json, re, shutil, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from services import Door, of_model
from commands import FADA, typed
from test_remote import service
from tiny import tiny
from fada.answers import AnswersLog
from fada.audit import Finding
from fada.clinical import DEMO_CATEGORIES
from fada.compare import collect, control_table, headline, systems
from fada.data import load_table
from fada.evaluate import choose_rows, evaluate, evaluate_answers, evaluate_job
from fada.pairs import compare_pair, people_table, rank_table, ready_pairs, subgroup_table
from fada.paper import paper_text
from fada.report import fold_findings, write_report
from fada.settings import FadaError, load_settings, write_json
from fada.topic import Topic
from fada.twins import ask_phrasings, ask_twins, phrasing_spread, seed45, twin_set, twin_summary
from fada.vlm import load


@pytest.fixture(scope='module')
def nano():
    return load('blip2-nano')


def test_twins_through_a_service_are_those_of_the_model(nano, tmp_path):
    "API models take the same test: the same pairs, the same verdicts"
    pairs = twin_set(('Abdomen', 'Femur'), 1, differ=('rotation', 'speckle'))
    here = ask_twins(nano, pairs)
    d = Door(of_model(nano))
    try:
        there = ask_twins(service(d, tmp_path), pairs)
    finally:
        d.close()
    assert there.error.eq('').all() and there.said_first.tolist() == here.said_first.tolist()
    assert twin_summary(there)['keep'] == twin_summary(here)['keep'] and len(here) == sum(
        len(t.change) + len(t.keep) for t in pairs
    )


def test_the_same_twins_for_the_same_seed():
    a, b = (twin_set(('Femur',), 1, seed=3, differ=('gain', 'size')) for _ in range(2))
    assert [(t.differ, t.first.image.tobytes(), t.second.image.tobytes()) for t in a] == [
        (t.differ, t.first.image.tobytes(), t.second.image.tobytes()) for t in b
    ]
    with pytest.raises(FadaError, match='no twins'):
        twin_set(('Cervix',), 1, differ=('rotation',))


def test_phrasings(nano, small_data):
    rows = load_table(small_data, split='test')
    rows = rows[rows.image.isin(rows.image.unique()[:3])]
    t = phrasing_spread(ask_phrasings(nano, small_data, rows))
    assert len(t) == 8 and t['spread'].between(0, 1).all() and t['one answer'].between(0, 1).all()


@pytest.mark.slow
def test_twins_command(tmp_path, small_data):
    r = subprocess.run(
        typed(
            'twins --model blip2-nano --categories Femur,Abdomen --n 2 --images 4 --data {data} --out {out} '
            '--json --quiet',
            data=small_data,
            out=tmp_path / 'twins',
        ),
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    out = json.loads(r.stdout)
    m = out['summary']
    assert m['pairs'] >= 20 and m['failed'] == 0 and m['change']['low'] is not None and len(out['phrasings']) == 8
    assert {t['differ'] for t in out['table']} == {
        'speckle',
        'gain',
        'rotation',
        'structure',
        'finding',
        'size',
        'scale',
    }


def frame(n, categories):
    return pd.DataFrame(
        [
            dict(
                image=f'{c}-{k}',
                category=c,
                patient=f'{c}{k}',
                question_id=q,
                question='?',
                answer='good',
                split='test',
            )
            for c in categories
            for k in range(n)
            for q in range(1, 9)
        ]
    )


def test_preset_is_five_by_three_by_three(nano, small_data, tmp_path):
    five = seed45(frame(7, ('Aorta', 'Cervix', 'Femur', 'Thorax', 'Abdomen', 'Cervical')))
    assert (
        len(five) == 45
        and five.groupby('category').image.nunique().tolist() == [3] * 5
        and set(five.question_id) == {1, 3, 6}
    )
    with pytest.raises(FadaError, match='preset seed45'):
        evaluate(nano, small_data, tmp_path, preset='seed45')
    with pytest.raises(FadaError, match='unknown preset'):
        choose_rows(nano, five, five, 0, 0, 'seed46', 0)


@pytest.mark.slow
def test_preset_end_to_end_on_the_demo_categories(tmp_path):
    "Phantoms of five planes, `fada evaluate --preset seed45`, and a report that says what 45 answers can show"
    data, job = tmp_path / 'data', tmp_path / 'run' / 'evaluate'
    ask = lambda *w: subprocess.run(
        [*FADA, *map(str, w), '--quiet', '--json'], check=True, capture_output=True, text=True
    )
    ask('phantom', '--n', 110, '--out', data, '--categories', ','.join(DEMO_CATEGORIES), '--seed', 3)
    m = json.loads(ask('evaluate', '--data', data, '--preset', 'seed45', '--control-images', 15, '--out', job).stdout)
    scores = pd.read_parquet(job / 'scores.parquet')
    plain = scores[scores.condition == 'plain']
    assert (
        len(plain) == 45
        and set(plain.question_id) == {1, 3, 6}
        and plain.groupby('category').image.nunique().eq(3).all()
    )
    assert m['preset']['name'] == 'seed45' and '45 answers' in m['preset']['can_show'] and m['control_images'] == 15
    out = json.loads(ask('compare', tmp_path / 'run').stdout)
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert out['lines'][0] == m['preset']['can_show'] and page.count('45 answers: a share of one half') == 2


def test_examples_are_for_models_that_chat(nano, small_data, tmp_path):
    with pytest.raises(FadaError, match='does not follow examples'):
        evaluate(nano, small_data, tmp_path / 'a', images=1, examples=2)
    chat = load('llava-1.5-7b', weights=tiny('llava', tmp_path)[2], device='cpu', precision='fp32', max_new_tokens=4)
    m = evaluate(chat, small_data, tmp_path / 'b', images=1, controls=False, examples=2)
    asked = [r['question'] for r in AnswersLog(tmp_path / 'b' / 'answers.jsonl').read()[0]]
    assert (
        m['examples'] == 2
        and len(asked) == 8
        and all('Answer 1: ' in q and 'Now for this image: ' in q for q in asked)
    )


@pytest.fixture(scope='module')
def run(small_data, tmp_path_factory):
    "Two systems from elsewhere on one table: one mostly right, one that copies the commonest answer"
    d = tmp_path_factory.mktemp('elsewhere')
    rows = load_table(small_data, split='test')
    common = rows.groupby('question_id').answer.agg(lambda a: a.value_counts().index[0])
    for name, said in (
        ('right', [a if k % 10 else 'nothing' for k, a in enumerate(rows.answer)]),
        ('common', rows.question_id.map(common)),
    ):
        rows[['image', 'category', 'question_id']].assign(
            question=rows.question_id, prediction=said, model=name
        ).to_csv(d / f'{name}.csv', index=False)
        evaluate_answers(d / f'{name}.csv', d / 'run' / f'{"ab"[name == "common"]}-{name}', small_data)
    return d / 'run'


def test_systems_from_elsewhere_side_by_side(run, small_data):
    jobs = collect(run)
    every = systems(jobs)
    assert [t for t, *_ in ready_pairs(jobs)] == ['against the first']
    a, b = every.values()
    c = compare_pair(b, a)
    ranks = rank_table(every)
    assert ranks.system[0].startswith('right') and c['endpoint']['mean'] > 0.2 and 0 < c['endpoint']['p'] <= 1
    html = write_report(run, small_data).read_text()
    assert (
        html.index('What to know first') < html.index('In five lines') < html.index('Models side by side')
        and 'answers from elsewhere' in html
    )
    assert 'topic similarity' not in html  # no sentence model is named
    assert {'ranks.md', 'pairs.tex', 'quality.md'} <= {p.name for p in (run / 'tables').iterdir()}
    assert {'forest.svg', 'forest.png', 'category_by_question.svg'} <= {p.name for p in (run / 'figures').iterdir()}
    r = subprocess.run(typed('compare {run} --json --quiet', run=run), capture_output=True, text=True)
    out = json.loads(r.stdout)
    assert r.returncode == 0 and len(out['ranks']) == 2 and out['pairs'] and Path(out['report']).is_file()


def test_people_beside_models(run, small_data, tmp_path):
    "A second reader who always agrees has 1; the model's score by either reader stands beside"
    scored = next(iter(systems(collect(run)).values()))
    seen = scored[scored.condition == 'plain'][['image', 'question_id', 'answer']]
    seen.assign(annotator='B').to_parquet(tmp_path / 'second_readings.parquet')
    t = people_table(tmp_path, scored)
    assert (
        len(t) == 8
        and t['second reader by first'].str.startswith('1.00').all()
        and not t['model by first'].str.startswith('1.00').all()
    )
    assert len(people_table(small_data, scored)) == 0


def test_people_stand_in_the_report(run, small_data, tmp_path):
    """A second reader of half the rows, agreeing nine times in ten: person against person beside model against
    person"""
    d = tmp_path / 'data'
    shutil.copytree(small_data, d)
    shutil.copytree(run, tmp_path / 'run')
    rows = load_table(d, split='test').iloc[::2]
    said = [a if k % 10 else 'cannot say' for k, a in enumerate(rows.answer)]
    rows[['image', 'question_id']].assign(answer=said, annotator='B').to_parquet(d / 'second_readings.parquet')
    page = write_report(tmp_path / 'run', d).read_text()
    text = (tmp_path / 'run' / 'tables' / 'people.md').read_text()
    assert 'Images that were read twice' in page
    assert text.startswith(
        '| question | rows | second reader by first | model by first | model by second | model − second reader |'
    )
    assert len(text.splitlines()) == 2 + rows.question_id.nunique()


def test_topic_similarity_where_the_settings_name_a_model(run, small_data, tmp_path, monkeypatch):
    "A tiny sentence model in a folder: its column and its name in metrics, report and methods; without it neither"
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({w for a in load_table(small_data).answer for w in re.findall(r'\w+|[^\w\s]', a.lower())})
    m = tmp_path / 'tiny'
    m.mkdir()
    (m / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words]))
    BertTokenizerFast(vocab_file=str(m / 'vocab.txt')).save_pretrained(m)
    BertModel(
        BertConfig(
            vocab_size=5 + len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(m)
    (tmp_path / 'settings.ini').write_text('[scores]\nsentence_model = tiny\n')
    monkeypatch.chdir(tmp_path)
    found = evaluate_answers(run.parent / 'right.csv', tmp_path / 'run' / 'a', small_data)
    assert found['sentence_model'].startswith('tiny ') and 0.5 < found['details'][1]['wording']['topic'] < 1
    page = write_report(tmp_path / 'run', small_data).read_text()
    assert 'topic similarity' in page and 'Topic similarity is that of tiny' in page
    (tmp_path / 'settings.ini').write_text('[scores]\nsentence_model = none\n')
    r = subprocess.run(typed('compare {path}', path=tmp_path / 'run'), capture_output=True, text=True)
    assert r.returncode == 1 and 'no sentence model' in r.stderr and len(r.stderr.strip().splitlines()) == 1


def test_a_language_models_own_folder_gives_topics(tmp_path, monkeypatch, nano, small_data):
    "Decoder and encoder–decoder; a folder that lacks weights, and one that is none, before anything is asked"
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    from tiny import tokenizer

    tok = tokenizer()
    size = dict(vocab_size=len(tok), num_hidden_layers=2, num_attention_heads=2)
    for name, model in (
        ('llama', LlamaForCausalLM(LlamaConfig(**size, hidden_size=16, intermediate_size=16))),
        (
            't5',
            T5ForConditionalGeneration(
                T5Config(
                    vocab_size=len(tok),
                    d_model=16,
                    d_ff=16,
                    d_kv=8,
                    num_layers=1,
                    num_heads=2,
                    tie_word_embeddings=True,
                )
            ),
        ),
    ):
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
        topic = Topic(tmp_path / name)
        same, other = topic(['liver, spine', 'liver, spine'], ['liver, spine', 'poor quality'])
        assert same > 0.999 > other
    w = load_file(tmp_path / 'llama' / 'model.safetensors')
    w.pop('model.norm.weight')
    save_file(w, tmp_path / 'llama' / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(FadaError, match='1 weights are missing.*norm.weight'):
        Topic(tmp_path / 'llama')
    (tmp_path / 'settings.ini').write_text('[scores]\nsentence_model = nowhere\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FadaError, match='no sentence model'):
        evaluate(nano, small_data, tmp_path / 'job')
    assert not (tmp_path / 'job').exists()


def test_findings_are_folded_the_gravest_first():
    "One line for a kind, whatever its questions and systems; all it rests on below it"
    f = lambda id, severity, q=None: Finding(id, severity, q, None, f'{id} {q}')
    out = fold_findings(
        {
            'a': [f('few-samples', 'red'), f('survives-without-image', 'amber', 3), f('not-read', 'amber', 2)],
            'b': [f('survives-without-image', 'red', 1), f('survives-without-image', 'red', 4)],
        },
        2,
    )
    assert [n['id'] for n in out] == ['survives-without-image', 'few-samples', 'not-read']
    assert out[0]['text'] == 'red: the score survives without the image (questions 1, 3, 4; 2 of 2 systems)'
    assert len(out[0]['more']) == 3 and out[0]['more'][-1].startswith('a, question 3 plane: ')
    assert out[1]['text'].endswith('(a): few-samples None') and out[1]['more'] == []


def test_subgroups_say_when_they_are_tied_to_the_category(run):
    scored = next(iter(systems(collect(run)).values()))
    t = subgroup_table(
        scored.assign(
            machine=scored.category.map({'Femur': 'A', 'Abdomen': 'B'}),
            site=scored.image.str[-5].isin(list('01234567')).map({True: 'x', False: 'y'}),
        )
    )
    assert t[t.by == 'machine'].remark.eq('tied to the category').all() and set(t.by) == {'machine', 'site'}


def test_paper_has_every_part(run, small_data):
    text = paper_text(run, small_data)
    for part in ('## What the audit found', '## Methods', '## Data', '## Results', '## Citations', '## Checklist'):
        assert part in text
    assert text.count('the authors must') >= 8 and re.search(r'Seed 0\. FADA', text) and 'simulated by FADA' in text
    r = subprocess.run(
        typed('paper {run} --data {data} --json --quiet', run=run, data=small_data), capture_output=True, text=True
    )
    assert Path(json.loads(r.stdout)['paper']).read_text().startswith('# ')


def test_runs_are_listed_filtered_and_pruned(run, tmp_path):
    out = tmp_path / 'outputs'
    (out / 'run' / 'x').mkdir(parents=True)
    (out / 'mine').mkdir()
    (out / 'mine' / 'notes.txt').write_text('kept')
    write_json(
        out / 'run' / 'x' / 'config.json',
        dict(kind='train', model='blip2-nano', categories=['Femur'], seed=0, seconds=3.0),
    )
    (out / 'run' / 'x' / 'adapter').mkdir()
    (out / 'run' / 'x' / 'adapter' / 'adapter_model.safetensors').write_bytes(b'1' * 10_000)
    (out / 'run' / 'y').mkdir()
    (out / 'run' / 'y' / 'run.log').write_text('begun')
    ask = lambda *more: json.loads(
        subprocess.run(
            [*typed('runs --output {output} --json', output=out), *more], check=True, capture_output=True, text=True
        ).stdout
    )
    assert {(r['job'], r['state']) for r in ask()} == {('x', 'finished'), ('y', 'unfinished')} and [
        r['job'] for r in ask('--kind', 'train', '--category', 'Femur')
    ] == ['x']
    for name, text in (('z', '{"kind": '), ('twins', '{"kind": "twins", "identity": {"precision": "fp32"}}')):
        (out / 'run' / name).mkdir()
        (out / 'run' / name / ('config.json' if name == 'z' else 'twins.json')).write_text(text)
    write_json(
        out / 'run' / 'twins' / 'job.json',
        dict(notebook='nbs/run/twins.ipynb', parameters=dict(model='m', categories='Femur,Aorta')),
    )
    rows = {r['job']: r for r in ask()}
    assert rows['z']['state'] == 'damaged' and rows['x']['red'] is None
    assert [rows['twins'][k] for k in ('kind', 'model', 'categories', 'precision')] == [
        'twins',
        'm',
        'Femur, Aorta',
        'fp32',
    ]
    shutil.rmtree(out / 'run' / 'z')
    plan = ask('--state', 'unfinished', '--prune')
    assert not plan['done'] and (out / 'run' / 'y').exists()
    assert ask('--state', 'unfinished', '--prune', '--yes')['done'] and not (out / 'run' / 'y').exists()
    assert (
        ask('--prune', '--weights', '--yes')['bytes'] == 10_000
        and (out / 'run' / 'x' / 'config.json').exists()
        and (out / 'mine' / 'notes.txt').exists()
    )


def test_predictions_alone_are_compared_too(tmp_path):
    "Without references and data: no score is made up, the report says so, and --json is plain JSON"
    (tmp_path / 'a.csv').write_text(
        'image,category,question,prediction\n'
        + ''.join(f'{k}.png,Femur,{q},good\n' for k in range(3) for q in (3, 6))
    )
    m = evaluate_answers(tmp_path / 'a.csv', tmp_path / 'run' / 'a')
    assert m['endpoint']['mean'] is None and m['coverage']['no_reference'] == 6
    assert 'references-missing' in {f['id'] for f in m['findings']}
    r = subprocess.run(
        typed('compare {path} --json --quiet', path=tmp_path / 'run'), capture_output=True, text=True, check=True
    )

    def refuse(word):
        raise ValueError(word)

    out = json.loads(r.stdout, parse_constant=refuse)
    assert 'nothing is scored' in out['lines'][0]
    assert 'no references' in (tmp_path / 'run' / 'report.html').read_text()


def test_references_without_controls_or_patients_say_so(tmp_path):
    "Nothing beaten where nothing stands beside; images are not taken for patients"
    (tmp_path / 'a.csv').write_text(
        'image,category,question,prediction,reference\n'
        + ''.join(f'{k}.png,Femur,6,good,{"good" if k % 2 else "poor"}\n' for k in range(6))
    )
    evaluate_answers(tmp_path / 'a.csv', tmp_path / 'run' / 'a')
    lines = headline(collect(tmp_path / 'run'))
    assert '6 test images of unknown patients' in lines[0] and lines[1] == 'No control stands beside these scores.'
    assert 'Abnormal images' not in lines[0]  # question 7 was not asked


def test_a_question_whose_references_cannot_be_read(nano, small_data, tmp_path):
    "Nothing to score there: a dash in every table, and a report all the same"
    d = tmp_path / 'data'
    shutil.copytree(small_data, d)
    t = pd.read_parquet(d / 'questions.parquet')
    t.loc[t.question_id == 4, 'answer'] = 'hm'
    t.loc[t.question_id == 4, 'structured'] = '{}'
    t.to_parquet(d / 'questions.parquet', index=False)
    settings = load_settings(model='blip2-nano', precision='fp32', categories='all', data=d)
    evaluate_job(settings, tmp_path / 'run' / 'evaluate', images=8, control_images=4)
    (scored,) = systems(collect(tmp_path / 'run')).values()
    row = control_table(scored).set_index('question').loc['4 biometry']
    assert (
        row['model'] == row['blank'] == row['smallest gain'] == '–'
        and write_report(tmp_path / 'run', d).stat().st_size > 10_000
    )
