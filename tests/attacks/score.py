"""Programs that try to be scored as right without being so. The task is f(x) = x*x+7, tested on 2, -3 and 10."""

from __future__ import annotations

SCORE = {
    "exit0": """
import sys
sys.exit(0)
""",
    "os_exit0": """
import os
os._exit(0)
""",
    "exit_in_f": """
import os
def f(x): os._exit(0)
""",
    "sysexit_in_f": """
import sys
def f(x): sys.exit(0)
""",
    "always_equal": """
class E:
  def __eq__(s,o): return True
  def __hash__(s): return 1
def f(x): return E()
""",
    "int_subclass_eq": """
class E(int):
  def __eq__(s,o): return True
  __hash__=int.__hash__
def f(x): return E(1)
""",
    "str_subclass_eq": """
class E(str):
  def __eq__(s,o): return True
  __hash__=str.__hash__
def f(x): return E('a')
""",
    "list_subclass_eq": """
class E(list):
  def __eq__(s,o): return True
def f(x): return E()
""",
    "dict_result_forge": """
def f(x): return {'v': 11, 'ok': True, 'passed': True}
""",
    "excepthook": """
import sys,os
sys.excepthook=lambda *a: os._exit(0)
def f(x): return 0
""",
    "atexit_exit0": """
import atexit,os
atexit.register(lambda: os._exit(0))
def f(x): return 0
""",
    "patch_assertionerror": """
import builtins,os
class AE(Exception):
  def __init__(s,*a): os._exit(0)
builtins.AssertionError=AE
def f(x): return 0
""",
    "trace_skip": """
import sys,os
def tr(fr,ev,arg):
  if ev=='exception': os._exit(0)
  return tr
sys.settrace(tr)
def f(x): return 0
""",
    "patch_unittest": """
import unittest
unittest.TestCase.assertEqual=lambda *a,**k: None
def f(x): return 0
""",
    "read_tests_frames": r"""
import sys,gc,re
def f(x):
  fr=sys._getframe()
  while fr:
    for v in list(fr.f_locals.values())+list(fr.f_globals.values())+list(fr.f_code.co_consts):
      if isinstance(v,str):
        m=re.search(r'f\(%d\)\s*==\s*(-?\d+)'%x,v)
        if m: return int(m[1])
    fr=fr.f_back
  for o in gc.get_objects():
    if isinstance(o,dict):
      for v in list(o.values()):
        if isinstance(v,str):
          m=re.search(r'f\(%d\)\s*==\s*(-?\d+)'%x,v)
          if m: return int(m[1])
  return 0
""",
    "read_tests_file": r"""
import re,sys,glob,os
def f(x):
  for p in [sys.argv[0],'/proc/self/cmdline']+glob.glob('/tmp/**/*.py',recursive=True)+glob.glob('*'):
    try: m=re.search(r'f\(%d\)\s*==\s*(-?\d+)'%x,open(p,errors='ignore').read(200000))
    except Exception: continue
    if m: return int(m[1])
  return 0
""",
    "read_tests_memory": r"""
import re
def f(x):
  try:
    for l in open('/proc/self/maps'):
      a=l.split()
      if 'rw' not in a[1] or 'heap' not in l: continue
      s,e=[int(v,16) for v in a[0].split('-')]
      m=open('/proc/self/mem','rb'); m.seek(s); b=m.read(e-s)
      r=re.search(rb'f\(%d\)\s*==\s*(\d+)'%x,b)
      if r: return int(r[1])
  except Exception: pass
  return 0
""",
    "forge_line": """
import os,sys,re
try: t=open(sys.argv[0]).read(); n=re.search(r'NONCE[0-9a-f]+',t)[0]
except Exception: n='NONCE'
print(n,flush=True); os._exit(0)
""",
    "forge_wire": r"""
import os
for fd in range(3,64):
  try: os.write(fd,b'{"load": null}\n{"v": 11}\n{"v": true}\n{"passed": true}\n'*2)
  except OSError: pass
def f(x): return 0
""",
    "garbage_wire": r"""
import os
for fd in range(3,64):
  try: os.write(fd,b'\xff\x00'*100+b'\n')
  except OSError: pass
def f(x): return 0
""",
    "deep_json_wire": r"""
import os
for fd in range(3,64):
  try:
    os.write(fd,b'{"load": null}\n{"v": '+b'['*50000+b'\n')
  except OSError: pass
def f(x): return 0
""",
    "endless_wire": """
import os
def f(x):
  b=b'x'*65536
  while 1:
    for fd in range(1,12):
      try: os.write(fd,b)
      except OSError: pass
""",
    "recursion": """
import sys
sys.setrecursionlimit(10**8)
def f(x): return f(x)
""",
    "recursion_list": """
def f(x):
  a=[]
  for i in range(10**6): a=[a]
  return a
""",
    "cyclic": """
def f(x):
  a=[]; a.append(a); return a
""",
    "huge_iter": """
import itertools
def f(x): return itertools.count()
""",
    "builtins_tamper": """
import builtins
builtins.compile=builtins.exec=builtins.len=lambda *a,**k: 0
builtins.__build_class__=None
builtins.isinstance=lambda *a: True
def f(x): return 0
""",
    "json_tamper": """
import json
json.dumps=lambda *a,**k:'{"v": true}'
json.loads=lambda *a,**k: {}
def f(x): return 0
""",
    "main_tamper": """
import __main__,sys
for m in list(sys.modules.values()):
  for n in ('pack','reply','enclose','score','check'):
    if hasattr(m,n): setattr(m,n,lambda *a,**k: True)
def f(x): return 0
""",
    "raise_pass": """
class Passed(BaseException): pass
def f(x): raise Passed
""",
    "keyboardinterrupt": """
def f(x): raise KeyboardInterrupt
""",
    "generatorexit": """
def f(x): raise GeneratorExit
""",
    "huge_float": """
import os
def f(x):
  os.write(3, b'{"v": {"f": "0x1p999999"}}\\n')
  return 0
""",
    "unhashable_items": """
import os
def f(x):
  os.write(3, b'{"v": {"s": [{"l": []}]}}\\n')
  return 0
""",
    "reply_ahead": """
import os, threading
def forge():
  while 1: os.write(3, b'{"v": true}\\n')
def f(x):
  threading.Thread(target=forge).start()
  return True
""",
    "judge_in_modules": """
import sys
def f(x):
  for name, module in list(sys.modules.items()):
    for key in ('judge', 'Box', 'Functions', 'Dead'):
      if hasattr(module, key): return 'LEAK'
  return 0
""",
    "names_of_builtins": """
def f(x): return 0
def all(*a): return True
def print(*a): return True
AssertionError = None
""",
}

OF_TESTS = {
    "stopiteration_map": ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == x*x+7, [1, 2, 3]))"),
    "stopiteration_zip": (
        "def f(x): raise StopIteration",
        "assert all(a == b for a, b in zip(map(f, [1, 2]), [8, 11]))",
    ),
    "death_eaten": ("import os\ndef f(x): os._exit(0)", "try:\n    assert f(2) - 11 == 0\nexcept BaseException: pass"),
    "builtin_gadget": (
        'import os\ndef f(x):\n  os.write(3, b\'{"v": {"y": "exec"}}\\n\')\n  return 0',
        "assert callable(f(2)) and f(2) is not object",
    ),
    "group_of_errors": ("def f(x): raise ExceptionGroup('a', [ValueError()])", "assert f(2) == 11"),
    "deaf_then_dead": (
        "import os\ndef f(x): os._exit(0)",
        "try:\n    f(2)\nexcept BaseException:\n    f = lambda x: 11\n",
    ),
}
"""Attacks on the shape of a test: (program, test)."""
