"""Tests the readers of Hugging Face models against NumPy, and folders that are pruned and written back."""

import json
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import sparsejax as sj
from experiments.models import encoders
from sparsejax import cli, hub, huggingface
from sparsejax.hub import llama as llama_reader
from sparsejax.hub import texts

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 13, (6, 5))
GPT2 = {'model_type': 'gpt2', 'n_head': 2, 'n_layer': 2, 'n_embd': 8, 'activation_function': 'gelu_new'}
LLAMA = {'model_type': 'llama', 'num_attention_heads': 4, 'num_key_value_heads': 2, 'num_hidden_layers': 2,
         'hidden_size': 8, 'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'rope_theta': 1e4, 'pad_token_id': 0}


WORDS = {'[PAD]': 0, 'the': 1, 'film': 2, 'is': 3, 'good': 4, 'bad': 5, '[UNK]': 6}
SHORT = {'max_length': 3, 'direction': 'Right', 'strategy': 'LongestFirst', 'stride': 0}  # of training, not of the data
FILLED = {'strategy': {'Fixed': 12}, 'direction': 'Right', 'pad_id': 6, 'pad_type_id': 0, 'pad_token': '[UNK]',
          'pad_to_multiple_of': None}
TOKENIZER = json.dumps({'version': '1.0', 'truncation': SHORT, 'padding': FILLED, 'added_tokens': [],
                        'normalizer': None, 'pre_tokenizer': {'type': 'Whitespace'}, 'post_processor': None,
                        'decoder': None, 'model': {'type': 'WordLevel', 'vocab': WORDS, 'unk_token': '[UNK]'}})


def tensors(shapes, dtype=np.float32):
  return {name: (RNG.standard_normal(shape) * 0.5).astype(dtype) for name, shape in shapes.items()}


def gpt2(layers=2):
  shapes = {'wte.weight': (13, 8), 'wpe.weight': (6, 8), 'ln_f.weight': (8,), 'ln_f.bias': (8,)}
  for i in range(layers):
    for name, sizes in {'attn.c_attn': (8, 24), 'attn.c_proj': (8, 8), 'mlp.c_fc': (8, 32), 'mlp.c_proj': (32, 8),
                        'ln_1': (8,), 'ln_2': (8,)}.items():
      shapes |= {f'h.{i}.{name}.weight': sizes, f'h.{i}.{name}.bias': sizes[-1:]}
  return tensors(shapes)


def llama(dtype=np.float32, layers=2):
  shapes = {'model.embed_tokens.weight': (13, 8), 'model.norm.weight': (8,), 'lm_head.weight': (13, 8)}
  for i in range(layers):
    at = f'model.layers.{i}.'
    shapes |= {f'{at}self_attn.{name}_proj.weight': (n, 8) for name, n in (('q', 8), ('k', 4), ('v', 4), ('o', 8))}
    shapes |= {f'{at}mlp.gate_proj.weight': (16, 8), f'{at}mlp.up_proj.weight': (16, 8),
               f'{at}mlp.down_proj.weight': (8, 16), f'{at}input_layernorm.weight': (8,),
               f'{at}post_attention_layernorm.weight': (8,)}
  return tensors(shapes, dtype)


def renamed(params, pairs):
  for old, new in pairs.items():
    params = {name.replace(old, new): value for name, value in params.items()}
  return params


# The oracles compute the same models in NumPy, position by position.


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def attention(q, k, v):
  """Computes causal attention of one head and one sentence, `[T, D]`."""
  return np.stack([softmax(k[:t + 1] @ q[t] / np.sqrt(q.shape[1])) @ v[:t + 1] for t in range(len(q))])


def heads_of(x, n):
  return np.split(x, n, -1)


def gpt2_in_numpy(p, ids):
  def norm(x, name):
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * p[f'{name}.weight'] + p[f'{name}.bias']

  dense = lambda x, name: x @ p[f'{name}.weight'] + p[f'{name}.bias']
  x = p['wte.weight'][ids] + p['wpe.weight'][:len(ids)]
  for i in range(sum(name.endswith('ln_1.weight') for name in p)):
    q, k, v = (heads_of(part, 2) for part in np.split(dense(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn'), 3, -1))
    x = x + dense(np.concatenate([attention(*each) for each in zip(q, k, v)], -1), f'h.{i}.attn.c_proj')
    h = dense(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc')
    x = x + dense(0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))), f'h.{i}.mlp.c_proj')
  return norm(x, 'ln_f') @ p['wte.weight'].T


def turned(x):
  """Rotates the pairs `(i, i + D/2)` of `[T, D]` as complex numbers."""
  half = x.shape[1] // 2
  angle = np.arange(len(x))[:, None] * 1e4 ** (-np.arange(half) / half)
  z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], 1)


def llama_in_numpy(p, ids):
  norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f'{name}.weight']
  x = p['model.embed_tokens.weight'][ids]
  for i in range(2):
    at = f'model.layers.{i}.'
    dense = lambda x, name, at=at: x @ p[f'{at}{name}_proj.weight'].T
    y = norm(x, f'{at}input_layernorm')
    q, k, v = (heads_of(dense(y, f'self_attn.{name}'), n) for name, n in (('q', 4), ('k', 2), ('v', 2)))
    y = np.concatenate([attention(turned(q[h]), turned(k[h // 2]), v[h // 2]) for h in range(4)], -1)
    x = x + dense(y, 'self_attn.o')
    y = norm(x, f'{at}post_attention_layernorm')
    gate = dense(y, 'mlp.gate')
    x = x + dense(gate / (1 + np.exp(-gate)) * dense(y, 'mlp.up'), 'mlp.down')
  return norm(x, 'model.norm') @ p['lm_head.weight'].T


@pytest.mark.parametrize('config, made, oracle', [(GPT2, gpt2, gpt2_in_numpy), (LLAMA, llama, llama_in_numpy)],
                         ids=['gpt2', 'llama'])
def test_a_decoder_is_its_formulas_written_out(config, made, oracle):
  params = made()
  valid = jnp.ones((2, 5), bool).at[1, 3:].set(False)
  found = jax.jit(hub.forward(config))(params, jnp.asarray(TOKENS[:2], jnp.int32), valid)
  wide = {name: value.astype(np.float64) for name, value in params.items()}
  np.testing.assert_allclose(found[0], oracle(wide, TOKENS[0]), rtol=2e-4, atol=2e-4)
  np.testing.assert_allclose(found[1, :3], oracle(wide, TOKENS[1, :3]), rtol=2e-4, atol=2e-4)


def test_the_pretrained_encoder_gives_its_embeddings(standard_promotion):
  folder = encoders.folder()
  config = json.loads((folder / 'config.json').read_text()) | {'num_hidden_layers': 2}
  params = safetensors.numpy.load_file(folder / 'model.safetensors')
  tokens = jnp.asarray([[101, 2023, 2003, 102, 0, 0], [101, 2307, 3185, 999, 999, 102]])
  hidden = jax.jit(hub.forward(config))(params, tokens, tokens != 0)
  weight = (tokens != 0)[..., None].astype(jnp.float32)
  pooled = (hidden * weight).sum(1)
  deeper = {f'block_{i}' for i in range(2, 6)}
  body = {key: value for key, value in encoders.load_pretrained(folder).items() if key not in deeper}
  expected = jax.jit(encoders.embed)(body, tokens, tokens != 0)
  np.testing.assert_allclose(pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True), expected, atol=1e-5)


def stored(folder, config, params, parts=1):
  """Writes a folder of `parts` files, with an index if there are several."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'tokenizer.json').write_text(TOKENIZER)
  names = list(params)
  files = ['model.safetensors'] if parts == 1 else [f'model-{i}-of-{parts}.safetensors' for i in range(parts)]
  where = {name: files[i % parts] for i, name in enumerate(names)}
  for file in files:
    safetensors.numpy.save_file({n: params[n] for n in names if where[n] == file}, folder / file, {'format': 'pt'})
  if parts > 1:
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': where}))
  return folder


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_sharded_folder_comes_back_in_the_same_layout_with_zeros_in_place(tmp_path, monkeypatch):
  params, config = llama(ml_dtypes.bfloat16, 1), LLAMA | {'num_hidden_layers': 1}
  folder, out = stored(tmp_path / 'dense', config, params, parts=2), tmp_path / 'sparse'
  before, tokens = contents(folder), np.where(TOKENS > 9, 0, TOKENS)
  with pytest.raises(OSError, match='No space left'), monkeypatch.context() as patched:
    patched.setattr(huggingface, '_synchronise', full)
    huggingface.prune_folder(folder, out, sj.recipes.wanda(pattern=sj.NM(2, 4)), tokens)
  assert [path.name for path in tmp_path.iterdir()] == ['dense']
  report = huggingface.prune_folder(folder, out, sj.recipes.wanda(pattern=sj.NM(2, 4)), tokens, packed=sj.NM(2, 4))
  assert contents(folder) == before and {row.rows for row in report.rows} == {int((tokens != 0).sum())}
  after = contents(out)
  assert after.keys() == before.keys()
  assert all(after[name] == before[name] for name in before if name.endswith('.json'))
  packed = sj.formats.unpack(sj.io.load(tmp_path / 'sparse.packed.safetensors'))
  flat = dict(zip(*sj.trees.flatten(packed)[:2]))
  for name in (name for name in before if name.endswith('.safetensors')):
    old, new = (safetensors.numpy.load_file(each / name) for each in (folder, out))
    assert list(old) == list(new) and safetensors.safe_open(out / name, 'numpy').metadata() == {'format': 'pt'}
    for key, value in new.items():
      np.testing.assert_array_equal(flat[key], value)
      assert value.dtype == ml_dtypes.bfloat16
      if '_proj' in key:
        assert ((value.reshape(len(value), -1, 4) != 0).sum(2) == 2).all()
        np.testing.assert_array_equal(value[value != 0], old[key][value != 0])
      else:
        np.testing.assert_array_equal(value, old[key])
  with pytest.raises(ValueError, match='is there already'):
    huggingface.prune_folder(folder, out, sj.recipes.wanda(0.5), tokens)


def full(folder):
  raise OSError(28, 'No space left on device')


def test_the_command_prunes_a_folder_and_says_in_one_line_what_is_wrong(tmp_path, capsys):
  small = GPT2 | {'n_layer': 1}
  folder = stored(tmp_path / 'dense', small, gpt2(1))
  np.save(tmp_path / 'ids.npy', TOKENS)
  call = lambda *more: cli.main(['prune', str(tmp_path / 'out'), '--model', f'hf:{folder}', '--data',
                                 str(tmp_path / 'ids.npy'), *more])
  assert call('--recipe', 'wanda', '--pattern', '2:4') == 0
  printed = capsys.readouterr()
  assert 'h.0.mlp.c_proj.weight' in printed.out and '4/4 h.0.mlp.c_proj.weight: 0.5000 zero' in printed.err
  made = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  assert ((made['h.0.attn.c_attn.weight'].reshape(2, 4, 24) != 0).sum(1) == 2).all()
  logits = hub.forward(small)(made, jnp.asarray(TOKENS, jnp.int32), jnp.ones(TOKENS.shape, bool))
  wide = {name: value.astype(np.float64) for name, value in made.items()}
  np.testing.assert_allclose(logits[0], gpt2_in_numpy(wide, TOKENS[0]), rtol=2e-4, atol=2e-4)  # of the written file
  assert call() == 2 and 'is there already' in capsys.readouterr().err
  shutil.rmtree(tmp_path / 'out')
  assert call('--recipe', 'wnda') == 2 and "Did you mean 'wanda'" in capsys.readouterr().err
  for config, why in (({'model_type': 'opt'}, "unknown `model_type` 'opt'"), ([], 'holds a list, and no names'),
                      ({'model_type': ['gpt2']}, 'unknown `model_type`'),
                      ({'model_type': 'gpt2'}, "config.json has no 'n_head'"),
                      (small | {'n_layer': 9}, "the model has no 'h.1.ln_1.weight'"),
                      (small | {'activation_function': 'relu'}, "only 'gelu_new' is known")):
    (folder / 'config.json').write_text(json.dumps(config))
    assert call('--recipe', 'wanda') == 2
    assert why in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_a_text_becomes_rows_by_line_or_windows_of_the_whole(tmp_path):
  folder = stored(tmp_path / 'dense', GPT2, {'w': np.zeros(1, np.float32)})
  text = tmp_path / 'text.txt'
  text.write_text('the film is good\n\nthe film is bad bad bad\nfilm\n')
  rows = texts.tokens(folder, text, length=5, padding=0)
  assert rows.tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 5, 5], [2, 0, 0, 0, 0]]
  assert texts.tokens(folder, text, length=4, padding=None).tolist() == [[1, 2, 3, 4], [1, 2, 3, 5], [5, 5, 5, 2]]
  assert texts.tokens(folder, text, length=5, padding=None).tolist()[-1] == [3, 5, 5, 5, 2]
  assert texts.tokens(folder, text, length=99, padding=None).shape == (1, 11)
  text.write_bytes(b'\xff\xfe')
  with pytest.raises(ValueError, match='is not UTF-8 text'):
    texts.tokens(folder, text, padding=0)
  text.write_text(' \n')
  with pytest.raises(ValueError, match='has no text'):
    texts.tokens(folder, text, padding=0)
  (folder / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match=r'tokenizer.json cannot be read as a tokenizer.*Give token ids as \.npy'):
    texts.tokens(folder, text, padding=0)


def test_a_model_of_any_type_enters_as_a_function_and_a_stop_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
  """Prunes a model that no reader knows, by a text; a Ctrl-C while the folder is written leaves no folder."""
  folder = stored(tmp_path / 'dense', {'model_type': 'own', 'pad_token_id': 0}, tensors(
      {'table': (13, 8), 'up': (16, 8), 'down': (16, 8), 'head': (8, 13)}), parts=2)
  (tmp_path / 'own.py').write_text(
      'import jax.numpy as jnp\ndef apply(p, tokens, valid):\n'
      '  return jnp.tanh(p["table"][tokens] @ p["up"].T) @ p["down"] @ p["head"]\n')
  (tmp_path / 'text.txt').write_text('the film is good\nthe film is bad\n')
  call = lambda function, *more: cli.main([
      'prune', str(tmp_path / 'out'), '--model', f'hf:{folder}', '--data', str(tmp_path / 'text.txt'), '--recipe',
      'wanda', '--pattern', '2:4', '--apply', f'{tmp_path}/own.py:{function}', *more])
  def stopped(*_):
    raise KeyboardInterrupt

  before = contents(folder)
  with monkeypatch.context() as patched:
    patched.setattr(huggingface, '_write_part', stopped)
    assert call('apply') == 130
  assert sorted(path.name for path in tmp_path.iterdir()) == ['dense', 'own.py', 'text.txt']
  assert call('apply', '--packed', '2:4') == 0 and contents(folder) == before
  new = {name: value for part in (tmp_path / 'out').glob('*.safetensors')
         for name, value in safetensors.numpy.load_file(part).items()}
  assert ((new['up'].reshape(16, 2, 4) != 0).sum(2) == 2).all()  # each along its contracted axis
  assert ((new['down'].reshape(4, 4, 8) != 0).sum(1) == 2).all() and (new['head'] != 0).all()
  packed = sj.formats.unpack(sj.io.load(tmp_path / 'out.packed.safetensors'))
  assert all(np.array_equal(packed[name], new[name]) for name in new)
  capsys.readouterr()
  assert call('aply') == 2 and "there is no function 'aply'" in capsys.readouterr().err


@pytest.mark.parametrize('config, made', [
    (GPT2 | {'vocab_size': 13, 'n_positions': 6, 'architectures': ['GPT2LMHeadModel']}, gpt2),
    (LLAMA | {'vocab_size': 13, 'intermediate_size': 16, 'max_position_embeddings': 64,
              'architectures': ['LlamaForCausalLM']}, llama)], ids=['gpt2', 'llama'])
def test_transformers_loads_a_pruned_folder_and_gives_the_same_logits(config, made, tmp_path):
  """Runs where `transformers` and PyTorch are installed, which the tests do not ask for: PyTorch takes 5 GB."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  folder, out = stored(tmp_path / 'dense', config, made(), parts=2), tmp_path / 'sparse'
  huggingface.prune_folder(folder, out, sj.recipes.sparsegpt(pattern=sj.NM(2, 4)), TOKENS)
  model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
  parts = [safetensors.numpy.load_file(part) for part in out.glob('*.safetensors')]
  params = {name: value for part in parts for name, value in part.items()}
  loaded = [value for name, value in model.state_dict().items() if name.endswith(('c_fc.weight', 'up_proj.weight'))]
  assert loaded and all(float((value == 0).float().mean()) >= 0.5 for value in loaded)
  with torch.no_grad():
    theirs = model(torch.tensor(np.asarray(TOKENS))).logits.numpy()
  ours = jax.jit(hub.forward(config))(params, jnp.asarray(TOKENS, jnp.int32), jnp.ones(np.shape(TOKENS), bool))
  np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_transformers_loads_a_pruned_encoder_and_gives_the_same_hidden_states(tmp_path):
  folder, out = encoders.folder(), tmp_path / 'sparse'
  tokens = np.array([[101, 2023, 2003, 2307, 102], [101, 2307, 3185, 999, 102]])
  report = huggingface.prune_folder(folder, out, sj.recipes.magnitude(pattern=sj.NM(2, 4)), tokens)
  assert len(report.rows) == 6 * 6 and report.achieved == 0.5  # and no norm, whose name has `attention` in it
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  model = transformers.AutoModel.from_pretrained(out, dtype=torch.float32).eval()
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).last_hidden_state.numpy()
  params = safetensors.numpy.load_file(out / 'model.safetensors')
  config = json.loads((out / 'config.json').read_text())
  ours = jax.jit(hub.forward(config))(params, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
  np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


# What is in the folders of other versions of `transformers`, and in folders that are not as they should be.


LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 1e4, 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}
KEPT = (16 / (2 * np.pi) - 1) / (4 - 1)  # of the first frequency, 1, which turns 2.5 times in 16 positions


@pytest.mark.parametrize('rope, scales', [
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4}}, (1, 1)),
    ({'rope_scaling': {'type': 'linear', 'factor': 4.0}, 'rope_theta': 1e4}, (1 / 4, 1 / 4)),
    ({'rope_parameters': LLAMA3}, (KEPT + (1 - KEPT) / 4, 1 / 4))], ids=['transformers 5', 'linear', 'llama3'])
def test_positions_turn_as_the_configuration_says(rope, scales):
  place = np.arange(5)[:, None]
  np.testing.assert_allclose(llama_reader.angles_of(rope)(5, 2), place * np.array([1, 1e-2]) * scales, rtol=1e-5)
  with pytest.raises(ValueError, match="hub.llama: unknown `rope_type` 'yarn'"):
    llama_reader.angles_of({'rope_scaling': {'rope_type': 'yarn'}})


def bert():
  shapes = {f'embeddings.{name}_embeddings.weight': (n, 8) for name, n in
            (('word', 13), ('position', 6), ('token_type', 2))}
  for at, sizes in {'attention.self.query': (8, 8), 'attention.self.key': (8, 8), 'attention.self.value': (8, 8),
                    'attention.output.dense': (8, 8), 'intermediate.dense': (16, 8), 'output.dense': (8, 16)}.items():
    shapes |= {f'encoder.layer.0.{at}.weight': sizes, f'encoder.layer.0.{at}.bias': sizes[:1]}
  for at in ('embeddings.LayerNorm', 'encoder.layer.0.attention.output.LayerNorm', 'encoder.layer.0.output.LayerNorm'):
    shapes |= {f'{at}.weight': (8,), f'{at}.bias': (8,)}
  return tensors(shapes)


BERT = {'model_type': 'bert', 'num_attention_heads': 2, 'num_hidden_layers': 1}


@pytest.mark.parametrize('config, params, pairs', [
    (BERT, bert(), {'LayerNorm.weight': 'LayerNorm.gamma', 'LayerNorm.bias': 'LayerNorm.beta'}),
    (LLAMA | {'num_hidden_layers': 1}, renamed(llama(layers=1), {'lm_head': 'score'}), {'model.': ''}),
    (GPT2 | {'n_layer': 1}, gpt2(1), {'wte': 'transformer.wte', 'wpe': 'transformer.wpe', 'h.0': 'transformer.h.0',
                                      'ln_f': 'transformer.ln_f'})], ids=['bert', 'llama', 'gpt2'])
def test_a_model_is_the_same_under_the_names_of_other_files(config, params, pairs, tmp_path):
  """Files converted from TensorFlow, and files of the body alone or of a larger model, name tensors otherwise."""
  run, valid = jax.jit(hub.forward(config)), jnp.ones(TOKENS.shape, bool)
  first, other = (run(each, jnp.asarray(TOKENS), valid) for each in (params, renamed(params, pairs)))
  np.testing.assert_array_equal(first, other)
  picked = sj.trees.select('test', sj.trees.named(*hub.MATRICES[config['model_type']]), renamed(params, pairs))
  assert sum(picked) == {'bert': 6, 'llama': 7, 'gpt2': 4}[config['model_type']]


def test_a_head_of_its_own_is_not_the_table_of_tokens():
  params, valid = gpt2(1), jnp.ones((6, 5), bool)
  run = jax.jit(hub.forward(GPT2 | {'n_layer': 1}))
  tied, own = (run({**params, 'lm_head.weight': factor * params['wte.weight']}, jnp.asarray(TOKENS), valid)
               for factor in (1, 2))
  np.testing.assert_allclose(own, 2 * tied, rtol=1e-5)


def test_everything_beside_the_weights_is_copied_and_dense_weights_of_other_forms_are_not(tmp_path):
  """The zeros of a folder must not come undone by a second file of dense weights that another tool prefers."""
  params = {name: np.float64(value) / 3 for name, value in gpt2(1).items()}  # with bits that float32 has not
  folder, out = stored(tmp_path / 'dense', GPT2 | {'n_layer': 1}, params), tmp_path / 'sparse'
  for name in ('2_Dense/model.safetensors', '1_Pooling/config.json', 'onnx/model.onnx', 'pytorch_model.bin'):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b'abc')
  (folder / 'lost').symlink_to('nowhere')
  (tmp_path / 'blob').write_bytes(b'abc')
  (folder / 'vocab.txt').symlink_to('../blob')  # as in the cache of huggingface_hub
  report = huggingface.prune_folder(folder, out, sj.recipes.magnitude(pattern='2:4'), TOKENS)
  assert {str(path.relative_to(out)) for path in out.rglob('*') if path.is_file()} == {
      'config.json', 'tokenizer.json', 'model.safetensors', '2_Dense/model.safetensors', '1_Pooling/config.json',
      'vocab.txt'}
  assert 'not copied, dense weights in another form: onnx, pytorch_model.bin' in str(report)
  for name, new in safetensors.numpy.load_file(out / 'model.safetensors').items():
    assert new.dtype == params[name].dtype
    np.testing.assert_array_equal(new[new != 0], params[name][new != 0])


def lacking(name):
  params = gpt2(1)
  params.pop(name)
  return params


WRONG = {
  'a tensor that is missing': ({'params': lacking('h.0.ln_2.bias')}, "the model has no 'h.0.ln_2.bias'"),
  'more layers than weights': ({'config': {'n_layer': 2}}, "the model has no 'h.1.ln_1.weight'"),
  'heads of another model': ({'config': {'n_head': 3}}, '3 heads, which do not divide the 8 outputs'),
  'a configuration without a key': ({'config': {'n_head': None}}, "config.json has no 'n_head'"),
  'a configuration that is a list': ({'config': []}, 'config.json holds a list'),
  'tokens of another model': ({'tokens': TOKENS + 9}, 'the model has the tokens 0 to 12'),
  'tokens below zero': ({'tokens': -TOKENS}, 'the model has the tokens 0 to 12'),
  'rows that are too long': ({'tokens': np.tile(TOKENS, 2)}, 'a row has 10 tokens, and the model has 6 positions'),
  'a recipe of factors': ({'more': ('--recipe', 'armor')}, 'has no place for factors'),
  'a recipe that is measured': ({'more': ('--recipe', 'ecoflap')}, "'sensitivity' is measured in Python"),
  'a packed copy that is there': ({'packed': True}, 'out.packed.safetensors is there already'),
  'a pattern that does not pack': ({'more': ('--pattern', '4:8', '--packed', '2:4')}, 'more than 2 nonzeros'),
  'a full disk': ({'room': 1000}, 'cannot be written'),
}


def with_room(room, write):
  """Returns `write` on a disk of which each file may have `room` bytes; JAX's own files are written before."""
  def written(*args):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
      return write(*args)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)

  return written


@pytest.mark.parametrize('case', WRONG)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left_behind(case, tmp_path, capsys, monkeypatch):
  what, why = WRONG[case]
  config = what.get('config', {})
  own = config if isinstance(config, list) else {
      key: value for key, value in (GPT2 | {'n_layer': 1} | config).items() if value is not None}
  folder, out = stored(tmp_path / 'dense', own, what.get('params') or gpt2(1)), tmp_path / 'out'
  np.save(tmp_path / 'ids.npy', what.get('tokens', TOKENS))
  if what.get('packed'):
    (tmp_path / 'out.packed.safetensors').write_text('of another run')
  before, there = contents(folder), sorted(tmp_path.iterdir())
  if 'room' in what:
    monkeypatch.setattr(huggingface, '_write', with_room(what['room'], huggingface._write))
  status = cli.main(['prune', str(out), '--model', f'hf:{folder}', '--data', str(tmp_path / 'ids.npy'), '--recipe',
                     'magnitude', '--packed', 'bitmask', *what.get('more', ())])
  said = capsys.readouterr().err.splitlines()
  assert status == 2 and re.search(why, said[-1]) and said[-1].startswith('sparsejax: ')
  assert contents(folder) == before and sorted(tmp_path.iterdir()) == there
