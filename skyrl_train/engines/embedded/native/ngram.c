/* Guesses from repetition: what followed the last time that these words were said.

   Two places are looked at. The request's own text, prompt and answer: the place where most of its last words, up to
   `longest`, stand already; of several such places the most recent one. And the answers of its siblings, requests with
   the same prompt: a table from the last words of a text, hashed together with the prompt, to what came next there.

   table[hash of prompt and last words] = what followed, `reach` words at most        WAYS entries a bucket, the oldest goes

   Of the table there are two in one: by the last LONG words, which is nearly always right, and by the last `shortest`.
   An own place with LONG words or more comes first, then the siblings' LONG, then the own place, then the siblings'. */

#include <stdint.h>
#include <string.h>

#define WAYS 4
#define LONG 8
#define NOTHING -1

typedef struct {
    uint64_t *keys;   /* [buckets, WAYS]; 0 is an empty entry */
    uint32_t *stamps; /* [buckets, WAYS] */
    int32_t *next;    /* [buckets, WAYS, reach], filled up with NOTHING */
    int64_t num_buckets; /* a power of two */
    int32_t reach, shortest, longest;
    uint32_t clock;
} Table;

static inline int least(int a, int b) { return a < b ? a : b; }

static inline uint64_t key_of(uint64_t prompt, const int32_t *end, int count) {
    uint64_t key = (prompt + (uint64_t)count) * 0xD1B54A32D192ED03ull;
    key ^= key >> 32;
    for (int i = 1; i <= count; i++) {
        key = (key ^ (uint32_t)end[-i]) * 0x9E3779B97F4A7C15ull;
        key ^= key >> 29;
    }
    return key ? key : 1;
}

static inline int64_t entry_of(const Table *table, uint64_t key) {
    const int64_t first = (int64_t)((key >> 20) & (uint64_t)(table->num_buckets - 1)) * WAYS;
    for (int64_t e = first; e < first + WAYS; e++)
        if (table->keys[e] == key) return e;
    return -1;
}

static void learn(Table *table, uint64_t key, const int32_t *next, int count) {
    int64_t e = entry_of(table, key);
    if (e < 0) {
        const int64_t first = (int64_t)((key >> 20) & (uint64_t)(table->num_buckets - 1)) * WAYS;
        e = first;
        for (int64_t other = first; other < first + WAYS; other++)
            if (table->keys[other] == 0 || (table->keys[e] != 0 && table->stamps[other] < table->stamps[e])) e = other;
    } else if (!memcmp(table->next + e * table->reach, next, sizeof(int32_t) * count)) {
        table->stamps[e] = table->clock;
        return; /* it knows as much and perhaps more */
    }
    int32_t *known = table->next + e * table->reach;
    table->keys[e] = key;
    table->stamps[e] = table->clock;
    for (int i = 0; i < table->reach; i++) known[i] = i < count ? next[i] : NOTHING;
}

/* The best place in a text of `length` words: where what follows begins, and how many words agree before it; 0 if fewer
   than `shortest` do. */
static int own_place(const int32_t *text, int length, int shortest, int longest, int *place) {
    const int32_t last = text[length - 1];
    int best = shortest - 1;
    for (int end = length - 1; end > best; end--) { /* words [.., end) against words [.., length) */
        if (text[end - 1] != last) continue;
        const int most = least(longest, end);
        int same = 1;
        while (same < most && text[end - 1 - same] == text[length - 1 - same]) same++;
        if (same > best) {
            best = same;
            *place = end;
            if (same == longest) break;
        }
    }
    return best >= shortest ? best : 0;
}

static int copy_known(const int32_t *next, int count, int32_t *out) {
    int i = 0;
    for (; i < count && next[i] != NOTHING; i++) out[i] = next[i];
    return i;
}

/* For n requests with their texts at text + row * stride: learn what their answers gained since word `learned`, then
   guess `room` words at most; out [n, width]. */
void ngram_guess(Table *table, int32_t n, const int32_t *text, int64_t stride, const int64_t *rows, const int32_t *length,
                 const int32_t *prompt_len, const uint64_t *prompt, int32_t *learned, const int32_t *room, int32_t *out,
                 int32_t width, int32_t *counts) {
    const int orders[2] = {table->shortest, table->longest < LONG ? table->longest : LONG};
    table->clock++;
    for (int i = 0; i < n; i++) {
        const int32_t *words = text + rows[i] * stride;
        int from = learned[i] - table->reach;
        if (from < prompt_len[i]) from = prompt_len[i];
        for (int at = from; at < length[i]; at++)
            for (int o = 0; o < 2; o++)
                if (at >= orders[o] && (o == 0 || orders[1] != orders[0]))
                    learn(table, key_of(prompt[i], words + at, orders[o]), words + at, least(table->reach, length[i] - at));
        learned[i] = length[i];
    }
    for (int i = 0; i < n; i++) {
        const int32_t *words = text + rows[i] * stride;
        int32_t *guesses = out + (int64_t)i * width;
        int place = 0;
        const int agree = own_place(words, length[i], table->shortest, table->longest, &place);
        int64_t entry = -1;
        if (agree < orders[1]) {
            if (length[i] >= orders[1]) entry = entry_of(table, key_of(prompt[i], words + length[i], orders[1]));
            if (entry < 0 && !agree && length[i] >= orders[0])
                entry = entry_of(table, key_of(prompt[i], words + length[i], orders[0]));
        }
        if (entry >= 0) {
            counts[i] = copy_known(table->next + entry * table->reach, least(room[i], table->reach), guesses);
        } else if (agree) {
            /* A text that repeats with a short period is longer than what stands behind the place. */
            const int period = length[i] - place;
            for (int j = 0; j < room[i]; j++) guesses[j] = words[place + j % period];
            counts[i] = room[i];
        } else {
            counts[i] = 0;
        }
    }
}
