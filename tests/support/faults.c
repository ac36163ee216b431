/* Preloaded into a process it fails the n-th call that changes a watched folder: open for writing, mkdir, write, sync,
   rename. fault_arm(folder, n, times, error) arms it, n = 0 only counts; fault_count() tells how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char watched[4096];
static long calls, first, last;
static int failure;

void fault_arm(const char *folder, long n, long times, int error) {
    strncpy(watched, folder, sizeof watched - 1);
    calls = 0, first = n, last = n + times - 1, failure = error;
}

long fault_count(void) { return calls; }

static int fails(const char *path) {
    if (!watched[0] || strncmp(path, watched, strlen(watched))) return 0;
    calls++;
    if (!first || calls < first || calls > last) return 0;
    errno = failure;
    return 1;
}

static int fails_on(int fd) {
    char link[64], path[4096];
    if (!watched[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define TRUE_CALL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPENS(name)                                                   \
    int name(const char *path, int flags, ...) {                      \
        va_list more;                                                 \
        va_start(more, flags);                                        \
        mode_t mode = va_arg(more, mode_t);                           \
        va_end(more);                                                 \
        if ((flags & (O_CREAT | O_TRUNC)) && fails(path)) return -1;  \
        return TRUE_CALL(name)(path, flags, mode);                    \
    }
#define OPENS_AT(name)                                                \
    int name(int at, const char *path, int flags, ...) {              \
        va_list more;                                                 \
        va_start(more, flags);                                        \
        mode_t mode = va_arg(more, mode_t);                           \
        va_end(more);                                                 \
        if ((flags & (O_CREAT | O_TRUNC)) && fails(path)) return -1;  \
        return TRUE_CALL(name)(at, path, flags, mode);                \
    }
#define ON(result, name, declared, given) \
    result name declared { return fails_on(fd) ? -1 : TRUE_CALL(name) given; }
/* A disk that is full, which is when more than one call fails, can still rename. */
#define AT(name, declared, given, path) \
    int name declared { return fails(path) && last <= first ? -1 : TRUE_CALL(name) given; }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
ON(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON(int, fsync, (int fd), (fd))
ON(int, fdatasync, (int fd), (fd))
ON(int, ftruncate, (int fd, off_t size), (fd, size))
ON(int, ftruncate64, (int fd, off64_t size), (fd, size))
ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off64_t *, size_t);
ON(ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size))
ON(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size))
ssize_t copy_file_range(int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags) {
    return fails_on(fd) ? -1 : TRUE_CALL(copy_file_range)(from, at, fd, to, size, flags);
}
int mkdir(const char *, mode_t);
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : TRUE_CALL(mkdir)(path, mode); }
AT(rename, (const char *from, const char *to), (from, to), to)
AT(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), to)
AT(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags), to)
