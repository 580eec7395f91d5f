// A plugin of QEMU that counts the executed instructions by the address of their block of code.
// Whenever DIR/mark appears it writes the counts to the file in DIR that is named there, as lines
// "address instructions", and removes the mark. It declares what it uses of qemu-plugin.h
// (version 1), because distributions do not ship it.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct qemu_plugin_tb;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*cb)(uint64_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

struct block {
	uint64_t address, length, executed;
	struct block *next;
};

enum { BUCKETS = 1 << 20 };
static struct block *table[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // guards the lists, not the counts
static char dir[4096];

static struct block *find(uint64_t address, uint64_t length)
{
	struct block **list = &table[(address * 0x9E3779B97F4A7C15ull) >> 44], *b;

	pthread_mutex_lock(&lock);
	for (b = *list; b && (b->address != address || b->length != length); b = b->next)
		;
	if (!b && (b = calloc(1, sizeof *b))) {
		*b = (struct block){address, length, 0, *list};
		*list = b;
	}
	pthread_mutex_unlock(&lock);
	return b;
}

static void translated(uint64_t id, struct qemu_plugin_tb *tb)
{
	uint64_t n = qemu_plugin_tb_n_insns(tb);
	struct block *b = find(qemu_plugin_tb_vaddr(tb), n);

	if (b)
		qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &b->executed, n);
}

// write_counts copies the counts first, because the guest goes on.
static void write_counts(const char *name)
{
	char path[4600];
	struct { uint64_t address, executed; } *seen = malloc((4ul << 20) * sizeof *seen);
	size_t n = 0;

	pthread_mutex_lock(&lock);
	for (int i = 0; i < BUCKETS; i++)
		for (struct block *b = table[i]; b && seen && n < 4ul << 20; b = b->next)
			if (b->executed) {
				seen[n].address = b->address;
				seen[n++].executed = b->executed;
			}
	pthread_mutex_unlock(&lock);
	snprintf(path, sizeof path, "%s/mark", dir);
	unlink(path);
	snprintf(path, sizeof path, "%s/%s", dir, name);
	FILE *f = fopen(path, "w");
	for (size_t i = 0; f && i < n; i++)
		fprintf(f, "%lx %lu\n", seen[i].address, seen[i].executed);
	if (f)
		fclose(f);
	free(seen);
}

static void *wait_for_marks(void *unused)
{
	char path[4600], name[64];

	snprintf(path, sizeof path, "%s/mark", dir);
	for (;; usleep(5000)) {
		FILE *f = fopen(path, "r");

		if (!f)
			continue;
		int ok = fscanf(f, "%63s", name);
		fclose(f);
		if (ok == 1)
			write_counts(name);
	}
	return NULL;
}

EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	pthread_t thread;

	if (argc != 1 || strncmp(argv[0], "dir=", 4) || strlen(argv[0]) >= sizeof dir)
		return -1;
	strcpy(dir, argv[0] + 4);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return pthread_create(&thread, NULL, wait_for_marks, NULL);
}
