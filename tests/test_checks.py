"What a group is told before and after its table is made: gravest first, names of people, templates, changed files."

import json, subprocess
import pandas as pd
import pytest
from commands import typed
from fada.checks import GRAVEST, check, masked, personal
from fada.data import prepare, verify
from fada.export import template
from fada.settings import FadaError
from test_data import group_folder, picture, write_rows


def fada(*words):
    return subprocess.run([*typed('data'), *map(str, words)], capture_output=True, text=True)


def test_gravest_findings_come_first(tmp_path):
    rows = group_folder(tmp_path, 4)
    empty = [*rows[0][:-1], '-']
    write_rows(tmp_path, [empty, *rows[1:], ['Femur', 'ghost.png', *rows[0][2:]], [*rows[1][:3], *'abcdefgh']])
    c = check(tmp_path)
    kinds = list(dict.fromkeys(c.findings.kind))
    assert (
        kinds == [k for k in GRAVEST if k in kinds]
        and kinds[-1] == 'no answer'
        and kinds[0] == 'answer without image'
    )
    at = [c.text().index(f'  {k}\n') for k in kinds if f'  {k}\n' in c.text()]
    assert at == sorted(at) and len(at) > 4


def test_what_prepare_would_refuse_is_said_and_the_status_is_1(tmp_path):
    """Nothing at all; too few patients for a split: the words of `prepare`, the whole document on standard output
    all the same"""
    (tmp_path / 'empty').mkdir()
    r = fada('check', tmp_path / 'empty', '--json', '--quiet')
    assert r.returncode == 1 and json.loads(r.stdout)['actions'] == {'refused': 1}
    assert len(r.stderr.strip().splitlines()) == 1 and 'no image has an answer' in r.stderr
    few = tmp_path / 'few'
    write_rows(few, group_folder(few, 2))
    with pytest.raises(FadaError) as e:
        prepare(few, 0, [], source='folder')
    r = fada('check', few, '--quiet')
    assert r.returncode == 1 and str(e.value) in r.stderr and 'refused' in r.stdout
    whole = tmp_path / 'whole'
    write_rows(whole, group_folder(whole, 4))
    r = fada('check', whole, '--quiet')
    assert (r.returncode, r.stderr) == (0, '') and 'refused' not in r.stdout


@pytest.mark.parametrize(
    'text,said',
    [
        ('Miller Anna 3', ['a name']),
        ('MÜLLER_JÜRGEN', ['a name']),
        ('DOE^JANE', ['a name']),
        ('MillerAnna', ['a name']),
        ('1987-03-14', ['a date']),
        ('us_14.03.1987', ['a date']),
        ('scan 20190731', ['a date']),
        ('MRN 44871', ['a hospital number']),
        ('48201937', ['a hospital number']),
        ('Smith, Jo 48201937', ['a hospital number', 'a name']),
        ('Patient00168_Plane5_2_of_2', []),
        ('img_0012', []),
        ('010_HC', []),
        ('Standard_NT 4', []),
        ('Trans-cerebellum', []),
        ('Four-Chamber View', []),
        ('Femur Normal Left', []),
        ('SAMSUNG WS80A', []),
        ('f-0123456789abcdef0123', []),
        ('000123', []),
    ],
)
def test_names_of_people_are_guessed(text, said):
    assert personal(text) == said


def test_names_of_people_are_counted_and_masked(tmp_path):
    rows = group_folder(tmp_path, 3)
    for k, name in enumerate(('Miller Anna.png', 'Miller Anna 2.png', 'MRN 448712.png')):
        picture(tmp_path / 'Femur' / name, 500 + k)
        rows.append(['Femur', name, *rows[0][2:]])
    write_rows(tmp_path, rows)
    f = check(tmp_path).findings
    f = f[f.kind == 'may name a person']
    assert (
        len(f) == 2
        and f.action.eq('kept').all()
        and not f.to_csv().count('Miller')
        and not f.to_csv().count('448712')
    )
    assert f.finding.str.contains('held a name: 2, such as Xxxxxx Xxxx, Xxxxxx Xxxx 9; ').any()
    assert masked('Ab 12-é') == 'Xx 99-x'


def test_a_template_lists_what_can_be_answered(tmp_path):
    group_folder(tmp_path, 2)
    (tmp_path / 'Femur' / 'broken.png').write_bytes(b'no picture')
    picture(tmp_path / 'Knee' / '1.png')
    for name in ('answers', 'answers.csv', '../answers.xlsx'):
        with pytest.raises(FadaError, match='ends in .xlsx'):
            template(tmp_path, name)
    r = fada('template', tmp_path, '--json', '--quiet')
    out = json.loads(r.stdout)
    assert out['images'] == 4 and {x['file'] for x in out['left_out']} == {'Femur/broken.png', 'Knee/1.png'}
    assert len(pd.read_excel(tmp_path / 'answers.xlsx')) == 4
    r = fada('template', tmp_path, '--name', 'more.xlsx', '--quiet')
    assert "left out: Knee/1.png: folder 'Knee'" in r.stdout
    (tmp_path / 'none' / 'Knee').mkdir(parents=True)
    picture(tmp_path / 'none' / 'Knee' / '1.png')
    with pytest.raises(FadaError, match='Knee/1.png: folder'):
        template(tmp_path / 'none')


def test_verify_says_what_changed_and_what_to_do(tmp_path):
    write_rows(tmp_path, group_folder(tmp_path, 4))
    prepare(tmp_path, 0, [], source='folder')
    (tmp_path / 'Femur' / 'img_0.png').unlink()
    picture(tmp_path / 'Femur' / 'new.png', 900)
    with open(tmp_path / 'answers.csv', 'a') as f:
        f.write('x')
    b = (tmp_path / 'Femur' / 'img_1.png').read_bytes()
    (tmp_path / 'Femur' / 'img_1.png').write_bytes(b[:-1] + b'!')
    found = dict(verify(tmp_path).values.tolist())
    size = (tmp_path / 'answers.csv').stat().st_size
    assert (
        found['Femur/img_0.png'].startswith('missing since')
        and 'put it back, or prepare again' in found['Femur/img_0.png']
    )
    assert (
        f'({size - 1:,} bytes then, {size:,} now)' in found['answers.csv'] and 'prepare again' in found['answers.csv']
    )
    assert f'other content in {len(b):,} bytes' in found['Femur/img_1.png'] and found['Femur/new.png'].startswith(
        'new: '
    )
    r = fada('verify', tmp_path)
    assert r.returncode == 1 and len(r.stdout.splitlines()) == 4


def test_phantoms_need_no_check_and_no_workbook(tmp_path):
    (tmp_path / 'phantoms.json').write_text('{}')
    picture(tmp_path / 'images' / 'Femur' / '1.png')
    for ask in (check, template):
        with pytest.raises(FadaError, match='phantoms, whose answers were made with them.*fada data verify'):
            ask(tmp_path)
