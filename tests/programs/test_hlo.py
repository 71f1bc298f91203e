"""Tests the reader of compiled programs: every form of collective, group and loop, with bytes worked out by hand."""

import pytest

from sparsejax.programs import hlo

HEAD = 'HloModule jit_f, is_scheduled=true, num_partitions=8\n\n'
F32, BF16 = 'f32[16,4]{1,0}', 'bf16[16,4]{1,0:T(8,128)(2,1)S(1)}'  # 256 and 128 bytes, the second as on a TPU


def entry(*lines, before=''):
  return f'{HEAD}{before}ENTRY %main.3_spmd (x.1: f32[16,4]) -> f32[16,4] {{\n  %x.1 = {F32} parameter(0)\n' + ''.join(
      f'  {line}\n' for line in lines) + '}\n'


def computation(name, *lines):
  return f'%{name} (p.1: f32[16,4]) -> f32[16,4] {{\n' + ''.join(f'  {line}\n' for line in lines) + '}\n\n'


SUM = 'ROOT %s.1 = f32[16,4]{1,0} all-reduce(%p.1), replica_groups={}'
PARAMETER = '%p.1 = f32[16,4]{1,0} parameter(0)'
BODY = computation('body.1', PARAMETER, SUM)
IDLE = computation('idle.1', PARAMETER, 'ROOT %n.1 = f32[16,4]{1,0} negate(%p.1)')
KNOWN = 'backend_config={"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize('kind, sent', [
    ('all-gather', 3 * 256), ('reduce-scatter', 3 * 64), ('all-reduce', 2 * 3 * 64), ('all-to-all', 3 * 64),
    ('collective-permute', 256), ('collective-broadcast', 256), ('all-gather-start', 3 * 256),
    ('all-reduce-start', 2 * 3 * 64), ('collective-permute-start', 256), ('ragged-all-to-all', 256),
])
def test_bytes_of_each_kind_around_a_ring_of_four(kind, sent):
  opcode, done = kind.removesuffix('-start'), 'done' if 'start' in kind else 'of'
  (found,) = hlo.collectives(entry(
      f'%c.1 = ({F32}, (u32[], /*index=2*/{F32})) {kind}(%x.1), channel_id=1, replica_groups=[2,4]<=[8], '
      'dimensions={0}, metadata={op_name="jit(f)/jvp()/a" stack_frame_id=7}',
      f'ROOT %d.1 = {F32} {opcode}-{done}(%c.1)'))
  assert found == hlo.Collective(opcode, ('f32[16,4]',), ('f32[16,4]',), 4, 1, False, 'jit(f)/jvp()/a')
  assert found.sent == found.sent_values == sent


@pytest.mark.parametrize('groups, size', [
    ('{{0,1},{2,3},{4,5},{6,7}}', 2), ('{{0,1,2,3,4,5,6,7}}', 8), ('{{0},{1}}', 1), ('{}', 8), ('[2,4]<=[8]', 4),
    ('[4,2]<=[2,4]T(1,0)', 2), ("mesh['a'=2,'b'=4] {'b'}", 4), ("mesh['a'=2,'b'=4] {'a','b'}", 8),
    ("mesh['a'=2,'b'=4] {'a','b':(1)2}", 4), ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}", 2),
])
def test_replica_groups_in_every_form(groups, size):
  text = entry(f'ROOT %c.1 = {F32} all-reduce(%x.1), channel_id=1, replica_groups={groups}, use_global_device_ids=true')
  assert [each.group for each in hlo.collectives(text)] == [size]


@pytest.mark.parametrize('groups', ['{{0,1},{2}}', '@groups.1', "mesh['a'=2] {'c'}"])
def test_groups_that_cannot_be_read_are_refused(groups):
  with pytest.raises(ValueError, match='replica groups.*all groups of one size'):
    hlo.collectives(entry(f'ROOT %c.1 = {F32} all-gather(%x.1), replica_groups={groups}, dimensions={{0}}'))


@pytest.mark.parametrize('text, message', [
    ('module @jit_f { }', 'ENTRY'), (entry(f'ROOT %a.1 = {F32} call(%x.1), to_apply=%body.1'), "calls 'body.1'")])
def test_a_text_that_is_not_whole_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    hlo.collectives(text)


@pytest.mark.parametrize('lines, before, times', [
    ([f'ROOT %w.1 = {F32} while(%x.1), condition=%idle.1, body=%body.1, {KNOWN}'], BODY + IDLE, [5]),
    ([f'ROOT %w.1 = {F32} while(%x.1), condition=%body.1, body=%idle.1, {KNOWN}'], BODY + IDLE, [6]),
    ([f'ROOT %w.1 = {F32} while(%x.1), condition=%idle.1, body=%body.1'], BODY + IDLE, [None]),
    ([f'%w.1 = {F32} while(%x.1), condition=%idle.1, body=%outer.1, {KNOWN}'],
     BODY + IDLE + computation('outer.1', PARAMETER, SUM.replace('ROOT ', ''),
                               f'ROOT %v.1 = {F32} while(%s.1), condition=%idle.1, body=%body.1, {KNOWN}'), [5, 25]),
    ([f'%w.1 = {F32} while(%x.1), condition=%idle.1, body=%outer.1'],
     BODY + IDLE + computation('outer.1', PARAMETER, f'ROOT %v.1 = {F32} while(%p.1), condition=%idle.1, '
                               f'body=%body.1, {KNOWN}'), [None]),
    ([f'%a.1 = {F32} call(%x.1), to_apply=%body.1', f'ROOT %b.1 = {F32} call(%a.1), to_apply=%body.1'], BODY, [1, 1]),
    ([f'%a.1 = (({F32}), {F32}) async-start(%x.1), calls=%body.1',
      f'%u.1 = (({F32}), {F32}) async-update(%a.1), calls=%body.1',
      f'ROOT %b.1 = {F32} async-done(%u.1), calls=%body.1'], BODY, [1]),
    ([f'ROOT %a.1 = {F32} custom-call(%x.1), called_computations={{%idle.1, %body.1}}'], BODY + IDLE, [1]),
    ([f'ROOT %a.1 = {F32} negate(%x.1), metadata={{op_name="f(calls=%body.1)"}}'], BODY, []),
    ([f'ROOT %a.1 = {F32} call(%x.1), to_apply=%idle.1'], IDLE, []),
    ([f'ROOT %a.1 = {F32} get-tuple-element(%all-gather.1), index=0, metadata={{op_name="all-reduce(x)"}}'], '', []),
])
def test_how_often_each_runs(lines, before, times):
  found = hlo.collectives(entry(*lines, before=before))
  assert [each.times for each in found] == times and not any(each.branch for each in found)


@pytest.mark.parametrize('attributes', [
    'branch_computations={%idle.1, %body.1}', 'true_computation=%body.1, false_computation=%idle.1'])
def test_a_branch_is_marked_and_so_is_what_it_calls(attributes):
  calls = computation('body.1', PARAMETER, f'ROOT %v.1 = {F32} while(%p.1), condition=%idle.1, body=%deep.1, {KNOWN}')
  deep = BODY.replace('%body.1', '%deep.1')
  (found,) = hlo.collectives(entry(f'ROOT %a.1 = {F32} conditional(%x.1, %x.1), {attributes}',
                                   before=deep + IDLE + calls))
  assert (found.times, found.branch) == (5, True)


@pytest.mark.parametrize('lines, before, value', [
    ([f'%n.1 = {BF16} convert(%x.1)', f'%w.1 = {F32} convert(%n.1)'], '', 'bf16'),
    ([f'%n.1 = {BF16} convert(%x.1)', f'%v.1 = {F32} convert(%n.1)', f'%w.1 = {F32} copy(%v.1)'], '', 'bf16'),
    ([f'%n.1 = {BF16} convert(%x.1)', f'%v.1 = {F32} convert(%n.1)', f'%w.1 = {F32} negate(%v.1)'], '', 'f32'),
    (['%n.1 = s8[16,4]{1,0} convert(%x.1)', f'%w.1 = {F32} convert(%n.1)'], '', 'f32'),
    ([f'%w.1 = {F32} fusion(%x.1), kind=kLoop, calls=%widen.1'],
     computation('widen.1', PARAMETER, f'%n.1 = {BF16} convert(%p.1)', f'ROOT %v.1 = {F32} convert(%n.1)'), 'bf16'),
    # The way goes through a fusion and out of its second parameter, printed first; then out of the other one.
    ([f'%n.1 = {BF16} convert(%x.1)', f'%v.1 = {F32} convert(%n.1)', f'%w.1 = {F32} fusion(%x.1, %v.1), calls=%same.1'],
     computation('same.1', '%q.1 = f32[16,4]{1,0} parameter(1)', PARAMETER, f'ROOT %r.1 = {F32} copy(%q.1)'), 'bf16'),
    ([f'%n.1 = {BF16} convert(%x.1)', f'%v.1 = {F32} convert(%n.1)', f'%w.1 = {F32} fusion(%x.1, %v.1), calls=%same.1'],
     computation('same.1', '%q.1 = f32[16,4]{1,0} parameter(1)', PARAMETER, f'ROOT %r.1 = {F32} copy(%p.1)'), 'f32'),
])
def test_what_was_widened_before_it_was_sent(lines, before, value):
  (found,) = hlo.collectives(entry(*lines, f'ROOT %c.1 = {F32} all-reduce(%w.1), replica_groups={{}}', before=before))
  assert found.operands == ('f32[16,4]',) and found.values == (f'{value}[16,4]',)
  assert (found.sent, found.sent_values) == (2 * 7 * 32, 2 * 7 * (16 if value == 'bf16' else 32))


@pytest.mark.parametrize('type_, size', [
    ('f32[]', 4), ('bf16[3,5]', 30), ('pred[7]', 7), ('s4[3]', 2), ('u8[4,0]', 0), ('f8e4m3fn[6]', 6), ('c64[2]', 16),
    ('(f32[2], (s32[], bf16[1]))', 14), ('token[]', 0), ('f64[<=2,3]', 48),
])
def test_bytes_of_a_type(type_, size):
  assert hlo.type_bytes(type_) == size


def test_a_type_of_unknown_width_is_refused():
  with pytest.raises(ValueError, match="'odd'"):
    hlo.type_bytes('odd[4]')


def test_reads_of_an_input_are_found_in_branches_loops_and_fusions():
  """The loop takes 4 of 16 rows a round, the other branch all; the input goes through tuples."""
  fused = ('%fused.1 (p.2: f32[16,4], i.2: s32[]) -> f32[4,4] {\n  %p.2 = f32[16,4]{1,0} parameter(0)\n'
           '  %i.2 = s32[] parameter(1)\n  ROOT %d.2 = f32[4,4]{1,0} dynamic-slice(%p.2, %i.2, %i.2)\n}\n\n')
  body = ('%body.1 (t.1: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {\n'
          '  %t.1 = (s32[], f32[16,4]{1,0}) parameter(0)\n  %i.1 = s32[] get-tuple-element(%t.1), index=0\n'
          '  %w.1 = f32[16,4]{1,0} get-tuple-element(%t.1), index=1\n'
          '  %f.1 = f32[4,4]{1,0} fusion(%w.1, %i.1), kind=kLoop, calls=%fused.1\n'
          '  ROOT %r.1 = (s32[], f32[16,4]{1,0}) tuple(%i.1, %w.1)\n}\n\n')
  condition = ('%more.1 (t.3: (s32[], f32[16,4])) -> pred[] {\n  %t.3 = (s32[], f32[16,4]{1,0}) parameter(0)\n'
               '  ROOT %c.3 = pred[] constant(true)\n}\n\n')
  few = ('%few.1 (p.4: f32[16,4]) -> f32[16,4] {\n  %p.4 = f32[16,4]{1,0} parameter(0)\n  %z.4 = s32[] constant(0)\n'
         '  %t.4 = (s32[], f32[16,4]{1,0}) tuple(%z.4, %p.4)\n'
         '  %l.4 = (s32[], f32[16,4]{1,0}) while(%t.4), condition=%more.1, body=%body.1\n'
         '  ROOT %o.4 = f32[16,4]{1,0} get-tuple-element(%l.4), index=1\n}\n\n')
  text = entry('%p = pred[] constant(true)', '%b.1 = f32[16,4]{1,0} bitcast(%x.1)',
               'ROOT %c.1 = f32[16,4]{1,0} conditional(%p, %b.1, %b.1), true_computation=%few.1, '
               'false_computation=%idle.1', before=fused + body + condition + few + IDLE)
  assert hlo.reads(text, 0) == (hlo.Read(64, None, True, 'dynamic-slice'), hlo.Read(256, 1, True, 'negate'))
  with pytest.raises(ValueError, match=r'has no input 1, but \[0\]; compile with jax.jit\(..., keep_unused=True\)'):
    hlo.reads(text, 1)
