"Published layouts: labels answer what they answer, nothing else; published splits hold or are refused."
import pandas as pd
import pytest
from fada.data import split_table
from fada.readers import guess_reader, read_any
from fada.settings import FadaError
from test_data import picture

def test_african_planes(tmp_path):
    rows = []
    for k, (centre, code) in enumerate((('Algeria', 'DZA'), ('Ghana', 'GHA'))):
        for j, plane in enumerate(('Fetal femur', 'Fetal brain', 'Fetal abdomen')):
            n = f'patient001_{code}_plane{j}'; picture(tmp_path/centre/f'{n}.png', 10*k+j)
            rows.append((n, plane, centre, 1, k))
    pd.DataFrame(rows, columns=['Filename', 'Plane', 'Center', 'Patient_num', 'Train']).to_csv(
        tmp_path/'African_planes_database.csv', index=False)
    assert guess_reader(tmp_path) == 'african-planes'; r = read_any(tmp_path); t = r.table
    assert set(t.question_id) == {3} and len(t) == 4 and t.patient.nunique() == 2      # numbers start anew in each centre
    assert (r.quarantine.reason == 'the brain plane is not labelled').sum() == 2 and set(t.site) == {'Algeria', 'Ghana'}

def test_fetal_nt(tmp_path):
    for n, f in (('1', 'Standard'), ('2', 'Non-standard'), ('3', 'Non-standard')):
        picture(tmp_path/'Set1'/f/f'{n}.png', int(n))
    pd.DataFrame(dict(fname=['1.png', '1.png', '2.png', '9.png', '2.png'], structure=['NT', 'nasal bone',
        'palate', 'NT', 'tail'],
                      h_min=0, w_min=0, h_max=5, w_max=5)).to_excel(tmp_path/'ObjectDetection.xlsx',
                      index=False)
    assert guess_reader(tmp_path) == 'fetal-nt'; r = read_any(tmp_path)
    said = {(x['image'][-5], x['question_id']): x['answer'] for x in r.rows}
    assert said['1', 1] == 'nuchal translucency, nasal bone' and said['2', 1] == 'palate' and ('3',
        1) not in said
    assert said['1', 3].endswith(', standard') and said['3', 3].endswith('non-standard') and {q for _,
        q in said} == {1, 3}
    assert len(r.aside) == 2      # the box without a picture, the structure that is none of the nine

def test_a_published_split_that_leaks_names_the_patients(tmp_path):
    rows = []
    for k in range(8):
        picture(tmp_path/'Images'/f'P{k}.png', k)
        rows.append((f'P{k}', k//2, 'Fetal femur', 'Not A Brain', 'Op', 'US', int(k not in (3, 6, 7))))
    pd.DataFrame(rows, columns=['Image_name', 'Patient_num', 'Plane', 'Brain_plane', 'Operator', 'US_Machine',
        'Train ']).to_csv(
        tmp_path/'FETAL_PLANES_DB_data.csv', sep=';', index=False)
    t = read_any(tmp_path).table
    with pytest.raises(FadaError, match='divides 1 patients.*fetal-planes:1'): split_table(t)
    t.loc[t.patient == 'fetal-planes:1', 'published_split'] = 'train'; s = split_table(t)
    assert set(s[s.split == 'test'].patient) == {'fetal-planes:3'} and s.groupby('patient').split.nunique().max() == 1
