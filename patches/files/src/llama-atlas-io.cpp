#include "llama-atlas.h"

#include "llama-arch.h"
#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"
#include "llama-vocab.h"

#define XXH_INLINE_ALL
#include "../vendor/hash/xxhash/xxhash.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <map>
#include <stdexcept>
#include <system_error>
#include <thread>

// the state of a sequence: the same code writes it and reads it, so that both agree
// what is read may come from anywhere: sizes, counts, indices and numbers are checked before they are used

// 2: all rows of a head are one piece; 3: the archive has the cache's types; 4: as many queries wait in each layer
static constexpr int32_t ATLAS_STATE_VERSION = 5;

// keys and values go in pieces of so many tokens that one of a layer has about so many bytes, as long as a state has not
// too many of them
static constexpr int64_t ATLAS_PIECE_BYTES = 1 << 20;
static constexpr int64_t ATLAS_PIECE_MIN   = 256; // tokens
static constexpr int64_t ATLAS_PIECE_MAX   = 2048;
static constexpr int64_t ATLAS_PIECES      = 2048; // of all layers together

static constexpr float   ATLAS_VALUE_MAX = 1e7f; // larger than any key, value or query, so that no sum of products overflows
static constexpr int64_t ATLAS_WAIT_MAX  = 512;  // queries that can wait

static void demand(bool ok, const char * what) {
    if (!ok) {
        throw std::runtime_error(what);
    }
}

static void demand_fit(bool ok, const char * what) {
    if (!ok) {
        throw llama_atlas_mismatch(what);
    }
}

static void check_values(const float * x, int64_t n) {
    // as integers, so that infinities and NaN are too large as well
    uint32_t limit, bits;
    memcpy(&limit, &ATLAS_VALUE_MAX, sizeof(limit));
    bool ok = true;
    for (int64_t i = 0; i < n; ++i) {
        memcpy(&bits, x + i, sizeof(bits));
        ok = ok & ((bits & 0x7fffffff) < limit);
    }
    demand(ok, "there is a value that no model computes");
}

static void check_rows(ggml_type type, const void * data, size_t size) {
    if (type == GGML_TYPE_F16) { // all of them are small enough, but for infinities and NaN
        const uint16_t * bits = (const uint16_t *) data;
        uint32_t n_bad = 0;
        for (size_t i = 0; i < size/sizeof(bits[0]); ++i) {
            n_bad += (bits[i] & 0x7c00) == 0x7c00;
        }
        demand(n_bad == 0, "there is a value that no model computes");
        return;
    }
    if (type == GGML_TYPE_Q8_0) { // and so are 128 times their scales
        const size_t n_block = ggml_type_size(type);
        uint32_t n_bad = 0;
        for (size_t i = 0; i < size; i += n_block) {
            uint16_t bits;
            memcpy(&bits, (const char *) data + i, sizeof(bits));
            n_bad += (bits & 0x7c00) == 0x7c00;
        }
        demand(n_bad == 0, "there is a value that no model computes");
        return;
    }
    float x[256];
    const int64_t step = 256/ggml_blck_size(type)*ggml_blck_size(type);
    const int64_t n    = size/ggml_type_size(type)*ggml_blck_size(type);
    for (int64_t i = 0; i < n; i += step) {
        const int64_t m = std::min(step, n - i);
        atlas_load_row(type, (const char *) data + ggml_row_size(type, i), x, m);
        check_values(x, m);
    }
}

// bytes after which the bytes of a row mean the same; 1: there is no such number, as with quantized ones
static size_t stride_of(ggml_type type) {
    return ggml_is_quantized(type) ? 1 : ggml_type_size(type);
}

// a type of the archive that comes from a file
static ggml_type check_type(int32_t type, int64_t d) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
            break;
        default:
            throw std::runtime_error("the archive has an unknown type");
    }
    demand(d % ggml_blck_size((ggml_type) type) == 0, "the archive has a type that its heads cannot have");
    return (ggml_type) type;
}

struct llama_atlas::state_io : public llama_io_write_i, public llama_io_read_i {
    state_io(llama_atlas_state_io fn, void * user, bool load) : fn(fn), user(user), load(load) {}

    llama_atlas_state_io fn;
    void * user;
    const bool load;

    llama_atlas_part part = LLAMA_ATLAS_PART_COUNTERS;
    int32_t il     = -1;
    int32_t piece  = 0;
    size_t  stride = 1;

    int64_t n_piece = 0; // tokens of a piece

    std::vector<std::pair<ggml_type, ggml_type>> types; // of the archive there, per layer: keys and values

    std::vector<uint8_t> tmp;
    std::vector<float>   row;

    void enter(llama_atlas_part part, int32_t il, size_t stride) {
        this->part   = part;
        this->il     = il;
        this->piece  = 0;
        this->stride = stride;
    }

    // for both directions
    void raw(void * data, size_t size) {
        if (size > 0 && !fn(user, part, il, piece, stride, data, size)) {
            throw std::runtime_error(load ? "the state ends too early" : "the state cannot be written");
        }
        n += size;
    }

    template <typename T>
    void num(T & x) {
        raw(&x, sizeof(x));
    }

    // a number that has to be the same where it is read
    void same(int32_t x, const char * what) {
        int32_t y = x;
        num(y);
        demand_fit(y == x, what);
    }

    void list(std::vector<uint32_t> & v, size_t n_max) {
        uint32_t n = v.size();
        num(n);
        if (load) {
            demand(n <= n_max, "a list is too long");
            v.resize(n);
        }
        raw(v.data(), n*sizeof(v[0]));
    }

    void skip(size_t size) {
        tmp.resize(std::min<size_t>(size, 1 << 20));
        for (size_t i = 0; i < size; i += tmp.size()) {
            raw(tmp.data(), std::min(tmp.size(), size - i));
        }
    }

    // for the KV cache
    void write(const void * src, size_t size) override {
        raw(const_cast<void *>(src), size);
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        if (ggml_backend_buffer_is_host(tensor->buffer)) {
            raw((char *) tensor->data + offset, size);
            return;
        }
        tmp.resize(size);
        ggml_backend_tensor_get(tensor, tmp.data(), offset, size);
        raw(tmp.data(), size);
    }

    void read(void * dst, size_t size) override {
        raw(dst, size);
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        tmp.resize(size);
        raw(tmp.data(), size);
        check_rows(tensor->type, tmp.data(), size);
        ggml_backend_tensor_set(tensor, tmp.data(), offset, size);
    }

    size_t n_bytes() override {
        return n;
    }

private:
    size_t n = 0;
};

// fn(i) for 0..n in this thread and those that there are CPUs for, moment by moment; what one throws is thrown here
void llama_atlas::share(size_t n, const std::function<void(size_t)> & fn) const {
    std::atomic<size_t> next = 0;
    std::array<std::exception_ptr, n_beside> errors;
    const auto work = [&](int32_t ith) {
        while (next < n) {
            if (ith > 0 && ith >= n_spare()) {
                std::this_thread::sleep_for(std::chrono::milliseconds(5));
                continue;
            }
            const size_t i = next.fetch_add(1);
            if (i >= n) {
                return;
            }
            try {
                fn(i);
            } catch (...) {
                errors[ith] = std::current_exception();
                next = n;
            }
        }
    };
    std::vector<std::thread> threads;
    try {
        for (int32_t ith = 1; ith < std::min<int32_t>(n_beside, std::thread::hardware_concurrency()); ++ith) {
            threads.emplace_back(work, ith);
        }
    } catch (const std::system_error &) {
        // there are as many as can be had
    }
    work(0);
    for (auto & thread : threads) {
        thread.join();
    }
    for (const auto & error : errors) {
        if (error) {
            std::rethrow_exception(error);
        }
    }
}

void llama_atlas::state(llama_memory_i & memory, llama_seq_id seq_id, llama_atlas_state_section section, llama_atlas_state_io fn, void * user, bool load) {
    if (seq_id < 0 || (size_t) seq_id >= std::min<size_t>(seqs.size(), cparams.n_seq_max)) {
        throw llama_atlas_mismatch(format("there is no sequence %d", seq_id));
    }
    std::vector<llama_kv_cache *> caches = { kv };
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(&memory)) {
        caches.push_back(iswa->get_swa());
    }
    seq & s = seqs[seq_id];
    state_io io(fn, user, load);

    const bool has_tokens = load && section == LLAMA_ATLAS_STATE_ARCHIVE ? s.n_tok == 0 : s.n_tok > 0;
    demand_fit(s.active, "the sequence shares its cells or was changed");
    demand_fit(has_tokens, load ? "the sequence is not empty" : "the sequence is empty");

    try {
        if (section == LLAMA_ATLAS_STATE_ARCHIVE) {
            state_counters(io, s);
            if (load) {
                reserve(s, 0);
            }
            const auto layer = [&](size_t i) {
                state_io own(io); // it knows where it is
                state_layer(own, s, i);
            };
            if (load) {
                share(layers.size(), layer);
            } else { // one after the other, as they are in the file
                for (size_t i = 0; i < layers.size(); ++i) {
                    layer(i);
                }
            }
        } else {
            for (auto * cache : caches) {
                state_cells(io, s, *cache, seq_id);
            }
            if (load) {
                reserve_work(s);
                state_resume(s, seq_id);
            }
        }
    } catch (...) {
        if (load && section == LLAMA_ATLAS_STATE_ARCHIVE) {
            reset(s);
        } else if (load) {
            memory.seq_rm(seq_id, -1, -1);
        }
        throw;
    }
}

void llama_atlas::state_counters(state_io & io, seq & s) {
    int32_t version = ATLAS_STATE_VERSION;
    io.num(version);
    demand_fit(version >= 2 && version <= ATLAS_STATE_VERSION, "it is of another version");
    io.same(layers.size(), "the model has another number of layers");
    for (const auto & l : layers) {
        io.same(l.il,        "the layers differ");
        io.same(l.n_head_kv, "the layers have another number of KV heads");
        io.same(l.n_rep,     "the layers have another number of heads");
        io.same(l.dk,        "the keys have another size");
        io.same(l.dv,        "the values have another size");
        io.same(l.k->type,   "the keys have another type");
        io.same(l.v->type,   "the values have another type");
        std::pair<int32_t, int32_t> there = { l.k->type, l.v->type };
        if (version > 3) {
            if (!io.load) {
                there = { l.type_k, l.type_v };
            }
            io.num(there.first);
            io.num(there.second);
        }
        io.types.emplace_back(check_type(there.first, l.dk), check_type(there.second, l.dv));
    }
    io.same(n_sink,  "the number of sinks differs");
    io.same(n_block, "the blocks of the archive have another size");

    int64_t n_mem = this->n_mem;
    int64_t first = first_kept(s);
    uint8_t slid  = s.slid;

    io.num(n_mem);
    io.num(s.n_tok);
    io.num(s.n_win0);
    s.n_wait.resize(layers.size());
    for (auto & n_wait : s.n_wait) {
        if (version > 4 || &n_wait == s.n_wait.data()) {
            io.num(n_wait);
        } else {
            n_wait = s.n_wait[0];
        }
    }
    io.num(s.n_rep);
    io.num(first);
    io.num(s.n_refresh);
    io.num(slid);

    io.n_piece = LLAMA_ATLAS_MAX_TOKENS;
    if (version > 2) {
        io.n_piece = io.load ? 0 : n_piece(s.n_tok);
        io.num(io.n_piece);
        demand(io.n_piece >= ATLAS_PIECE_MIN && io.n_piece <= LLAMA_ATLAS_MAX_TOKENS, "the size of the pieces is out of range");
    }

    if (io.load) {
        demand(s.n_tok > 0 && s.n_tok <= LLAMA_ATLAS_MAX_TOKENS, "the number of tokens is out of range");
        demand(s.n_win0 >= 0 && s.n_win0 <= s.n_tok, "the window is out of range");
        demand(s.n_win0 == 0 || (s.n_win0 >= n_sink + n_mem && (s.n_win0 - n_sink) % n_block == 0), "the window is out of range");
        demand_fit(s.n_win0 == 0 || n_mem == this->n_mem, "the number of memory cells differs");
        demand_fit((s.n_win0 == 0 ? s.n_tok : n_sink + n_mem + s.n_tok - s.n_win0) <= n_ctx, "it has more cells than a sequence here");
        demand(std::all_of(s.n_wait.begin(), s.n_wait.end(), [&](int64_t n) { return n >= 0 && n <= std::min(s.n_tok, ATLAS_WAIT_MAX); }),
                "the number of waiting queries is out of range");
        demand(s.n_rep >= 0 && s.n_rep <= std::max<int64_t>(0, s.n_win0 - n_sink)/n_block, "the number of blocks is out of range");
        demand(first >= n_sink && first <= std::max(n_sink, s.n_win0) && (first - n_sink) % n_block == 0, "the archive is out of range");
        demand(s.n_refresh >= 0, "the number of refreshes is out of range");
        s.slid   = slid;
        s.n_lost = first;
    }
}

void llama_atlas::state_cells(state_io & io, seq & s, llama_kv_cache & cache, llama_seq_id seq_id) {
    const uint32_t strm = cache.seq_to_stream[seq_id];
    auto & cells = cache.v_cells[strm];

    demand_fit(!cache.has_cell_ext() && !cache.layers.empty(), "the KV cells are of a special kind");
    io.enter(LLAMA_ATLAS_PART_CELLS, -1, stride_of(cache.layers[0].k->type));

    llama_kv_cache::cell_ranges_t cr { strm, {} };
    std::vector<uint32_t> idx, pos;
    uint32_t head = cache.v_heads[strm];
    if (!io.load) {
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (!cells.is_empty(i) && cells.seq_has(i, seq_id)) {
                if (!cr.data.empty() && cr.data.back().second == i) {
                    cr.data.back().second++;
                } else {
                    cr.data.emplace_back(i, i + 1);
                }
                idx.push_back(i);
                pos.push_back(cells.pos_get(i));
            }
        }
    }
    io.num(head);
    io.list(idx, cells.size());
    io.list(pos, cells.size());
    if (!io.load) {
        cache.state_write_data(io, cr);
        return;
    }

    const size_t n = idx.size();
    demand(n > 0 && pos.size() == n && head <= cells.size(), "the KV cells are out of range");

    // each position once; those of the cache with full attention are known
    std::vector<uint32_t> order(pos);
    std::sort(order.begin(), order.end());
    const int64_t n_front = s.n_win0 > 0 ? n_sink + n_mem : 0;
    for (size_t i = 0; i < n; ++i) {
        if (&cache == kv) {
            const int64_t expected = (int64_t) i < n_front ? i : s.n_win0 > 0 ? s.n_win0 + i - n_front : i;
            demand(order[i] == expected, "the positions of the KV cells are out of order");
        } else {
            demand(order[i] < s.n_tok && (i == 0 || order[i] > order[i - 1]), "the positions of the KV cells are out of order");
        }
    }
    demand(order.back() == s.n_tok - 1, "the last KV cell is missing");

    llama_batch_allocr balloc(cache.hparams.n_pos_per_embd());
    llama_ubatch ubatch = balloc.ubatch_reserve(n, 1);
    ubatch.seq_id_unq[0] = seq_id;
    for (size_t i = 0; i < n; ++i) {
        ubatch.pos[i]      = pos[i];
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id[i]   = &seq_id;
    }

    // the order of the cells is that of the sums: keep it where they are free
    bool keep = true;
    for (size_t i = 0; i < n; ++i) {
        keep = keep && idx[i] < cells.size() && (i == 0 || idx[i] > idx[i - 1]) && cells.is_empty(idx[i]);
    }
    llama_kv_cache::slot_info sinfo;
    if (keep) {
        sinfo.s0 = sinfo.s1 = strm;
        sinfo.resize(1);
        sinfo.strm[0] = strm;
        sinfo.idxs[0] = idx;
    } else {
        sinfo = cache.find_slot(ubatch, false);
        demand_fit(!sinfo.empty(), "there are not enough free KV cells");
    }
    cache.apply_ubatch(sinfo, ubatch);
    if (keep && cells.get_used() == n) {
        cache.v_heads[strm] = head;
    }
    demand_fit(cache.state_read_data(io, strm, n, sinfo), "the KV cells do not fit");
}

// the same for a sequence that has grown, until it is several times as long: what does not change stays in its piece
int64_t llama_atlas::n_piece(int64_t n_tok) const {
    size_t size = 0;
    for (const auto & l : layers) {
        size = std::max({ size, l.n_head_kv*l.row_k(), l.n_head_kv*l.row_v() });
    }
    const int64_t n_pieces = std::max<int64_t>(8, ATLAS_PIECES/layers.size());
    int64_t res = ATLAS_PIECE_MIN;
    while ((res < ATLAS_PIECE_MAX && 2*res*(int64_t) size <= ATLAS_PIECE_BYTES) || res*n_pieces < n_tok) {
        res *= 2;
    }
    return res;
}

// the rows of the tokens t0..t1 that the archive holds, in their order; those before `first` are only read
// there: their type in the state
void llama_atlas::state_rows(state_io & io, const seq & s, ggml_type type, ggml_type there, int64_t n_values, void * data, int64_t first, int64_t t0, int64_t t1) {
    const size_t own  = ggml_row_size(type,  n_values);
    const size_t size = ggml_row_size(there, n_values);
    const auto rows = [&](int64_t r, int64_t n) {
        uint8_t * p = (uint8_t *) data + r*own;
        if (type == there) {
            io.raw(p, n*size);
            if (io.load) {
                check_rows(type, p, n*size);
            }
            return;
        }
        constexpr int64_t n_max = 256; // rows at a time
        io.row.resize(n_values);
        for (int64_t i0 = 0; i0 < n; i0 += n_max) {
            const int64_t m = std::min(n_max, n - i0);
            io.tmp.resize(m*size);
            io.raw(io.tmp.data(), m*size);
            check_rows(there, io.tmp.data(), m*size);
            for (int64_t i = 0; i < m; ++i) {
                atlas_load_row (there, io.tmp.data() + i*size, io.row.data(), n_values);
                atlas_store_row(type,  io.row.data(), p + (i0 + i)*own, n_values);
            }
        }
    };
    t1 = std::min(t1, s.n_tok);
    if (t0 < std::min(n_sink, t1)) {
        rows(t0, std::min(n_sink, t1) - t0);
    }
    int64_t t = std::max({ t0, n_sink, io.load ? s.n_lost : first });
    if (io.load && t < std::min(first, t1)) {
        io.skip((std::min(first, t1) - t)*size);
        t = first;
    }
    while (t < t1) {
        const int64_t m = std::min(t1 - t, n_cap - (t - n_sink) % n_cap);
        rows(row(t), m);
        t += m;
    }
}

void llama_atlas::state_layer(state_io & io, seq & s, size_t i_layer) {
    const layer & l = layers[i_layer];
    const int64_t first = first_kept(s);

    head * heads = s.heads.data() + l.head0;

    const auto pieces = [&](llama_atlas_part part, ggml_type type, ggml_type there, int64_t n_values, llama_atlas_buffer head::* data) {
        io.enter(part, l.il, stride_of(there));
        for (int64_t t = 0; t < s.n_tok; t += io.n_piece) {
            for (int32_t g = 0; g < l.n_head_kv; ++g) {
                state_rows(io, s, type, there, n_values, (heads[g].*data).data(), first, t, t + io.n_piece);
            }
            io.piece++;
        }
    };
    pieces(LLAMA_ATLAS_PART_KEYS,   l.type_k, io.types[i_layer].first,  l.dk, &head::k);
    pieces(LLAMA_ATLAS_PART_VALUES, l.type_v, io.types[i_layer].second, l.dv, &head::v);
    io.enter(LLAMA_ATLAS_PART_SCORES, l.il, sizeof(float));
    for (int32_t g = 0; g < l.n_head_kv; ++g) {
        head & h = heads[g];
        state_rows(io, s, GGML_TYPE_F32, GGML_TYPE_F32, 1, h.u.data(), first, 0, s.n_tok);
        io.list(h.idx,  n_mem);
        io.list(h.slot, n_mem);
        io.list(h.rank, n_mem);
        io.list(h.surv, n_mem);
        io.list(h.cand, h.cand.capacity());
        io.num(h.t_cand);
        io.num(h.threshold);
        io.num(h.n_recalled);
    }

    // queries that have not been scored; they are not worth much if there are more of them than can wait here
    const size_t n_query = (size_t) l.n_head_kv*l.n_rep*l.dk;
    const size_t n_wait  = s.n_wait[i_layer]*n_query;
    if (n_wait <= s.wait[i_layer].size()) {
        io.raw(s.wait[i_layer].data(), n_wait*sizeof(float));
    } else {
        io.skip(n_wait*sizeof(float));
    }

    if (!io.load) {
        return;
    }

    if (n_wait <= s.wait[i_layer].size()) {
        check_values(s.wait[i_layer].data(), n_wait);
    }

    std::vector<float> x(l.dk);
    std::vector<uint8_t> taken(n_mem);

    for (int32_t g = 0; g < l.n_head_kv; ++g) {
        head & h = heads[g];

        const auto in_archive = [&](uint32_t t) { return t >= n_sink && t < s.n_win0; };
        demand(std::all_of(h.idx .begin(), h.idx .end(), in_archive), "a memory cell is out of range");
        demand(std::all_of(h.surv.begin(), h.surv.end(), in_archive), "a survivor is out of range");
        demand(std::all_of(h.cand.begin(), h.cand.end(), in_archive), "a candidate is out of range");

        demand(std::is_sorted(h.idx.begin(), h.idx.end()), "the memory cells are out of order");
        demand(std::adjacent_find(h.idx.begin(), h.idx.end()) == h.idx.end(), "a token is in two memory cells");
        demand(h.slot.size() == h.idx.size(), "the memory cells are incomplete");
        std::fill(taken.begin(), taken.end(), 0);
        for (uint32_t i : h.slot) {
            demand(i < n_mem && !taken[i], "a memory cell is out of range");
            taken[i] = 1;
        }
        std::vector<uint32_t> order(h.surv);
        std::sort(order.begin(), order.end());
        demand(std::adjacent_find(order.begin(), order.end()) == order.end(), "a token survives twice");

        h.rank.resize(n_mem, UINT32_MAX);
        demand(h.t_cand >= 0, "the time of the candidates is out of range");
        h.t_cand = std::min(h.t_cand, s.n_tok); // it could be later in version 3, where the last tokens had been removed
        demand(h.threshold >= 0.0f && h.threshold < ATLAS_VALUE_MAX, "the threshold is out of range");
        demand(h.n_recalled >= 0, "the number of recalled blocks is out of range");

        mean_keys(l, h, (first - n_sink)/n_block, s.n_rep, x.data());
    }
}

// what is not in the state because it follows from it
void llama_atlas::state_resume(seq & s, llama_seq_id seq_id) {
    for (size_t i = 0; i < layers.size(); ++i) {
        const layer & l = layers[i];
        if ((size_t) s.n_wait[i]*l.n_head_kv*l.n_rep*l.dk > s.wait[i].size()) {
            s.n_wait[i] = 0;
        }
    }
    s.n_lost = std::max(s.n_lost, first_kept(s));
    if (s.n_win0 == 0) {
        return;
    }
    demand(find_cells(seq_id, s.cells), "the memory cells are missing");

    std::vector<int32_t> pos;
    for (int64_t i = 0; i < n_sink + n_mem; ++i) {
        pos.push_back(s.n_win0 - n_mem - n_sink + i);
    }
    for (const auto & r : ropes) {
        s.t_cell.push_back(make_table(r, pos));
    }

    if (!staged) {
        return;
    }
    const uint32_t strm = kv->get_stream(seq_id);
    const int64_t kv_size = kv->get_size();
    std::vector<uint8_t> line;
    for (const auto & l : layers) {
        s.stage_k.emplace_back(s.cells.size()*l.k->nb[1]);
        s.stage_v.emplace_back(s.cells.size()*l.v->nb[1]);
        const size_t el_v = ggml_type_size(l.v->type);
        for (size_t i = 0; i < s.cells.size(); ++i) {
            ggml_backend_tensor_get(l.k, s.stage_k.back().data() + i*l.k->nb[1], strm*l.k->nb[2] + s.cells[i]*l.k->nb[1], l.k->nb[1]);
            if (!kv->v_trans) {
                ggml_backend_tensor_get(l.v, s.stage_v.back().data() + i*l.v->nb[1], strm*l.v->nb[2] + s.cells[i]*l.v->nb[1], l.v->nb[1]);
            }
        }
        for (int64_t d = 0; kv->v_trans && d < (int64_t) l.n_head_kv*l.dv; ++d) {
            line.resize(kv_size*el_v);
            ggml_backend_tensor_get(l.v, line.data(), (strm*l.v->ne[0] + d)*kv_size*el_v, line.size());
            for (size_t i = 0; i < s.cells.size(); ++i) {
                memcpy(s.stage_v.back().data() + i*l.v->nb[1] + d*el_v, line.data() + s.cells[i]*el_v, el_v);
            }
        }
    }
}

size_t llama_atlas::cells_size(llama_memory_i & memory) const {
    std::vector<const llama_kv_cache *> caches = { kv };
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(&memory)) {
        caches.push_back(iswa->get_swa());
    }
    size_t res = 0;
    for (const auto * cache : caches) {
        res += cache->total_size()/cache->n_stream;
    }
    return res;
}

uint64_t llama_atlas::model_hash() const {
    XXH64_state_t * state = XXH64_createState();
    XXH64_reset(state, 0);
    const auto add = [&](const void * data, size_t size) { XXH64_update(state, data, size); };
    const auto add_string = [&](const std::string & text) { add(text.c_str(), text.size() + 1); };

    add_string(model.arch_name());
    for (uint32_t i = 0; i < model.vocab.n_tokens(); ++i) {
        add_string(model.vocab.token_get_text(i));
    }
    // their order, and whether tied embeddings are there twice, depends on where the layers are: a file written on a
    // GPU must be good for the CPU
    const std::map<std::string, const ggml_tensor *> tensors(model.tensors_by_name.begin(), model.tensors_by_name.end());
    std::vector<uint8_t> data;
    for (const auto & [name, tensor] : tensors) {
        add_string(name);
        add(&tensor->type, sizeof(tensor->type));
        add(tensor->ne, sizeof(tensor->ne));
        // the norms are small, never in a special layout, and differ after any training
        if (tensor->type == GGML_TYPE_F32 && tensor->buffer && ggml_nbytes(tensor) <= 1 << 20) {
            data.resize(ggml_nbytes(tensor));
            ggml_backend_tensor_get(tensor, data.data(), 0, data.size());
            add(data.data(), data.size());
        }
    }
    for (const auto & r : ropes) {
        add(&r.n_rot, sizeof(r.n_rot));
        add(&r.freq_base,  sizeof(r.freq_base));
        add(&r.freq_scale, sizeof(r.freq_scale));
        add(r.factors.data(), r.factors.size()*sizeof(float));
    }
    add(&cparams.yarn_ext_factor, sizeof(cparams.yarn_ext_factor));

    const uint64_t res = XXH64_digest(state);
    XXH64_freeState(state);
    return res;
}
