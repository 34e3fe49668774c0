"""Programs that try to do harm: to files, processes, the network, memory, or to read what is not theirs.

HARNESS is the pid of the process that judges, HADDR an address in its memory, PORT a port that it listens on, TOKEN a
name in its environment and of its abstract socket, SECRET a file of its own, MARKS a folder for all to write.
"""

from __future__ import annotations

HARM = {
    "fork_bomb": """
import os,time
n=0
try:
  for i in range(60):
    if os.fork()==0: time.sleep(20); os._exit(0)
    n+=1
except OSError: pass
if n: open(MARKS+'/fork','w').write(str(n))
def f(x): return 0
""",
    "daemonize": """
import os,time
def f(x):
  try:
    if os.fork()==0:
      os.setsid()
      if os.fork(): os._exit(0)
      time.sleep(25); os._exit(0)
    open(MARKS+'/daemon','w').write('x')
  except OSError: pass
  return 0
""",
    "subprocess": """
import subprocess
def f(x):
  try:
    o=subprocess.run(['/bin/sh','-c','echo hi; touch '+MARKS+'/sub'],capture_output=True).stdout
  except OSError: o=b''
  return 0
""",
    "memory": """
def f(x):
  b=[]
  while 1: b.append(bytearray(64<<20))
""",
    "memory_catch": """
def f(x):
  b=[]
  try:
    while 1: b.append(bytearray(16<<20))
  except MemoryError: pass
  open(MARKS+'/mem','w').write(str(len(b)*16)) if len(b)>200 else 0
  return 0
""",
    "bigint": """
def f(x): return 9**9**9
""",
    "bigstr_reply": """
def f(x): return 'a'*(300<<20)
""",
    "stdout_1gb": """
import sys
def f(x):
  s='y'*(1<<20)
  for i in range(1000): sys.stdout.write(s)
  return 0
""",
    "disk_fill": """
def f(x):
  for d in (MARKS,'/tmp','/var/tmp','/dev/shm','.'):
    try:
      with open(d+'/TOKEN','wb') as h:
        for i in range(50): h.write(b'z'*(1<<20))
    except OSError: pass
  return 0
""",
    "network_tcp": """
import socket
def f(x):
  try:
    s=socket.create_connection(('127.0.0.1',PORT),1); s.send(b'hi'); s.close()
  except OSError: pass
  return 0
""",
    "unix_abstract": r"""
import socket
def f(x):
  try:
    s=socket.socket(socket.AF_UNIX); s.connect('\0TOKEN'); s.send(b'hi'); s.close()
  except OSError: pass
  return 0
""",
    "read_secret": """
import os
def f(x):
  for p in (SECRET, '/root/.ssh/id_rsa'):
    try: return 'LEAK'+open(p).read()
    except OSError: pass
  return 0
""",
    "read_env": """
import os
def f(x):
  return 'LEAK' if any('TOKEN' in k for k in os.environ) else 0
""",
    "proc_environ": """
import os,glob
def f(x):
  for p in ['/proc/1/environ','/proc/%d/environ'%os.getppid()]+glob.glob('/proc/[0-9]*/environ'):
    try:
      if b'TOKEN' in open(p,'rb').read(): return 'LEAK'
    except OSError: pass
  return 0
""",
    "proc_cmdline": """
import glob
def f(x):
  for p in glob.glob('/proc/[0-9]*/cmdline'):
    try:
      if b'TOKEN' in open(p,'rb').read(): return 'LEAK'
    except OSError: pass
  return 0
""",
    "signal_parent": """
import os,signal
def f(x):
  r=[]
  for p in (os.getppid(),HARNESS):
    try: os.kill(p,signal.SIGUSR1 if p==HARNESS else 0); r.append(p)
    except OSError: pass
  return 'LEAK' if r else 0
""",
    "kill_all": """
import os
def f(x):
  try: os.kill(-1,0); return 'LEAK'
  except OSError: return 0
""",
    "ptrace": """
import ctypes,os
L=ctypes.CDLL(None,use_errno=True)
def f(x):
  for p in (os.getppid(),HARNESS):
    if L.ptrace(0x4206,p,0,0)==0:
      L.ptrace(17,p,0,0); return 'LEAK'
  return 0
""",
    "process_vm": """
import ctypes,os
L=ctypes.CDLL(None,use_errno=True)
class I(ctypes.Structure): _fields_=[('b',ctypes.c_void_p),('l',ctypes.c_size_t)]
def f(x):
  b=ctypes.create_string_buffer(8); l=I(ctypes.addressof(b),8)
  for p in (os.getppid(),HARNESS):
    r=I(HADDR,8)
    if L.process_vm_readv(p,ctypes.byref(l),1,ctypes.byref(r),1,0)>0: return 'LEAK'
  return 0
""",
    "inf_loop": """
def f(x):
  while 1: pass
""",
    "inf_loop_load": """
while 1: pass
""",
    "sleep": """
import time
def f(x): time.sleep(1000)
""",
    "ignore_sigs": """
import signal
for s in range(1,64):
  try: signal.signal(s,signal.SIG_IGN)
  except (OSError,ValueError): pass
def f(x):
  while 1: pass
""",
    "threads": """
import threading,time
def f(x):
  try:
    for i in range(5000): threading.Thread(target=time.sleep,args=(30,)).start()
  except RuntimeError: pass
  return 0
""",
    "thread_alive": """
import threading,time
threading.Thread(target=lambda: [time.sleep(.1) for i in range(300)]).start()
def f(x): return 0
""",
    "segfault": """
import ctypes
def f(x): return ctypes.string_at(0)
""",
    "abort": """
import os
def f(x): os.abort()
""",
    "symlink": """
import os
def f(x):
  try: os.symlink(SECRET,MARKS+'/link'); return open(MARKS+'/link').read() and 'LEAK'
  except OSError: return 0
""",
    "userns": """
import ctypes
L=ctypes.CDLL(None,use_errno=True)
def f(x): return 'LEAK' if L.unshare(0x10000000)==0 else 0
""",
    "io_uring": """
import ctypes
L=ctypes.CDLL(None,use_errno=True)
def f(x):
  b=ctypes.create_string_buffer(256)
  return 'LEAK' if L.syscall(425,4,b)>=0 else 0
""",
    "memfd": """
import os
def f(x):
  try: fd=os.memfd_create('a'); os.write(fd,b'x'*(1<<20)); return 'LEAK'
  except OSError: return 0
""",
    "raise_rlimit": """
import resource
def f(x):
  try: resource.setrlimit(resource.RLIMIT_AS,(1<<40,1<<40)); return 'LEAK'
  except (OSError,ValueError): return 0
""",
    "setuid_root": """
import os
def f(x):
  try:
    os.setuid(0); return 'LEAK'
  except OSError: return 0
""",
    "owner_of_signals": """
import fcntl, os
def f(x):
  for command, value in ((8, HARNESS), (10, 9), (8, os.getppid())):
    try: fcntl.fcntl(3, command, value); return 'LEAK'
    except OSError: pass
  return 0
""",
    "left_descriptors": """
import os
def f(x):
  for fd in range(4, 1024):
    try: os.fstat(fd); return 'LEAK'
    except OSError: pass
  return 0
""",
    "send_descriptors": """
import array, os, socket
def f(x):
  try: s = socket.socket(fileno=3); s.sendmsg([b'x'], [(1, 1, array.array('i', [0]))]); return 'LEAK'
  except OSError: return 0
""",
    "exec_python": """
import os, sys
def f(x):
  for path in ('/bin/sh', '/usr/bin/env', sys.executable or '/usr/bin/python3'):
    try: os.execv(path, [path, '-c', 'touch ' + MARKS + '/exec'])
    except (OSError, ValueError): pass
  return 0
""",
    "change_files": """
import os
def f(x):
  for act in (lambda: os.chmod(SECRET, 0o777), lambda: os.truncate(SECRET, 0), lambda: os.unlink(SECRET),
              lambda: os.rename(SECRET, MARKS + '/moved'), lambda: os.link(SECRET, MARKS + '/linked'),
              lambda: os.utime(SECRET), lambda: os.mkdir(MARKS + '/made'), lambda: os.chown(SECRET, 1, 1)):
    try: act(); return 'LEAK'
    except OSError: pass
  return 0
""",
    "parent_memory": """
import os
def f(x):
  for p in (os.getppid(), HARNESS, 1):
    for name in ('mem', 'maps', 'environ', 'fd/0', 'root/etc/passwd', 'cwd/x'):
      try: open('/proc/%d/%s' % (p, name), 'rb').read(1); return 'LEAK'
      except OSError: pass
  return 0
""",
    "write_below_python": """
import os, sys
def f(x):
  for folder in (*sys.path, '/usr/lib', '/lib'):
    try: open(folder + '/TOKEN', 'w'); return 'LEAK'
    except OSError: pass
  return 0
""",
}
