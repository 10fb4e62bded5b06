// Instruction counter, a plugin of qemu 7 and 8: at every getpgid system call, which calls.py makes for that,
// the instructions that one thread has run so far. Debian ships no header of the interface, hence the
// declarations (https://www.qemu.org/docs/master/devel/tcg-plugins.html).
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { kAdd = 0, kGetpgid = 155 };  // QEMU_PLUGIN_INLINE_ADD_U64; the number on aarch64
typedef uint64_t Id, Word;
typedef void OnBlock(Id, void* block);
typedef void OnCall(Id, unsigned cpu, int64_t number, Word, Word, Word, Word, Word, Word, Word, Word);

size_t qemu_plugin_tb_n_insns(const void* block);
void qemu_plugin_register_vcpu_tb_trans_cb(Id, OnBlock*);
void qemu_plugin_register_vcpu_tb_exec_inline(void* block, int op, void* counter, uint64_t by);
void qemu_plugin_register_vcpu_syscall_cb(Id, OnCall*);

int qemu_plugin_version = 1;
static uint64_t count;

static void on_block(Id id, void* block) {
  (void)id;
  const size_t instructions = qemu_plugin_tb_n_insns(block);
  qemu_plugin_register_vcpu_tb_exec_inline(block, kAdd, &count, instructions);
}

static void on_call(Id id, unsigned cpu, int64_t number, Word a, Word b, Word c, Word d, Word e,
                    Word f, Word g, Word h) {
  (void)id, (void)cpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
  if (number == kGetpgid) fprintf(stderr, "instructions %llu\n", (unsigned long long)count);
}

int qemu_plugin_install(Id id, const void* info, int argc, char** argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_block);
  qemu_plugin_register_vcpu_syscall_cb(id, on_call);
  return 0;
}
