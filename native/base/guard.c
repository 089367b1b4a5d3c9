#define _GNU_SOURCE
#include "base/guard.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>

/* The only mutable globals of the library. A process has one handler for a signal: they remember the handler before
 * ours, and how many calls still need ours. A handler learns nothing but the thread it runs in: each thread says in
 * `current` what it reads. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards the next three where they are written */
static int n_calls;                                       /* that need the handler */
static bool in_place;           /* ours is the process's handler, or beneath one that was installed later */
static struct sigaction before; /* the one that ours replaced */
/* In the thread's static block: the first access must not allocate, since a handler may make it. */
static _Thread_local const dg_guard *current __attribute__((tls_model("initial-exec")));

static void on_sigbus(int number, siginfo_t *info, void *context) {
    const int saved = errno;
    const bool mended = current != NULL && current->mend(current->owner, info->si_addr);
    errno = saved;
    if (mended) return;
    if ((before.sa_flags & SA_SIGINFO) != 0)
        before.sa_sigaction(number, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(number);
    else
        sigaction(SIGBUS, &before,
                  NULL); /* returning repeats the fault, which then ends the process as it would have */
}

static bool is_ours(const struct sigaction *action) {
    return (action->sa_flags & SA_SIGINFO) != 0 && action->sa_sigaction == on_sigbus;
}

static void install(void) {
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) != 0 || is_ours(&now)) return;
    /* A handler that was installed over ours will call ours, if it wants that: twice in the chain would be a circle. */
    const bool has_handler =
        (now.sa_flags & SA_SIGINFO) != 0 || (now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN);
    if (in_place && has_handler) return;
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&ours.sa_mask);
    before = now;
    in_place = sigaction(SIGBUS, &ours, NULL) == 0;
}

static void restore(void) {
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) != 0 || !is_ours(&now)) return; /* theirs stays, with ours beneath it */
    in_place = sigaction(SIGBUS, &before, NULL) != 0;
}

const dg_guard *dg_guard_enter(const dg_guard *guard) {
    const dg_guard *outer = current;
    pthread_mutex_lock(&mutex);
    if (n_calls++ == 0) install();
    pthread_mutex_unlock(&mutex);
    current = guard;
    return outer;
}

void dg_guard_leave(const dg_guard *outer) {
    current = outer;
    pthread_mutex_lock(&mutex);
    if (--n_calls == 0) restore();
    pthread_mutex_unlock(&mutex);
}

const dg_guard *dg_guard_current(void) { return current; }

void dg_guard_adopt(const dg_guard *guard) { current = guard; }
