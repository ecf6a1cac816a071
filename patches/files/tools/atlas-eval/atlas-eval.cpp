// What is the long-context memory (llama-atlas.h) worth on a text?
//
// Measures the mean negative log-likelihood (nats per token) of texts that are longer than the context, for
//   full      full attention, in a context that holds the whole text
//   window    the sinks and the most recent tokens only
//   atlas     with the memory
//   shuffled  with random tokens in the memory cells, which the memory must beat
// Writes one JSON object per line to stdout, logs to stderr.

#include "llama-atlas.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using json = nlohmann::ordered_json;

static const char * usage =
    "usage: llama-atlas-eval -m FILE [options] (--text FILE[:OFFSET] | --copy PASSAGE[:OFFSET] FILLER[:OFFSET])...\n"
    "\n"
    "  -m,   --model FILE        GGUF file\n"
    "  -c,   --ctx-size N        cells of the context (512)\n"
    "  -n,   --tokens N          tokens of each text (2048)\n"
    "        --skip N            tokens at the start of a text that are not scored (1.5 contexts)\n"
    "        --text FILE[:OFF]   a text, from a character on; repeatable\n"
    "        --copy P[:OFF] F[:OFF]  a passage, a filler, the passage again: its second reading is scored; repeatable\n"
    "        --passage N         tokens of a passage (400)\n"
    "        --filler N          tokens of a filler (800)\n"
    "        --modes LIST        of full,window,atlas,shuffled (all)\n"
    "        --atlas-cells N     memory cells (half of the context)\n"
    "        --atlas-window N    exact recent tokens (the rest)\n"
    "        --atlas-recall F    share of the cells for recalled blocks (0.5)\n"
    "        --atlas-refresh N   tokens of an answer between two refreshes (1; 16 on a GPU)\n"
    "        --atlas-chunk N     tokens of a prompt read at a time (16)\n"
    "        --scored-chunk N    ... of what is scored: 1 as in an answer; with more, the first tokens of a chunk\n"
    "                            profit from what the later ones recall (1)\n"
    "        --atlas-blend F     attention mass of the memory cells (1)\n"
    "        --atlas-archive-max MiB\n"
    "        --atlas-type-k, --atlas-type-v TYPE  types of the archive (q8_0 where the cache has more bits)\n"
    "  -ctk, -ctv TYPE           cache types (f16)\n"
    "  -fa   on|off|auto         flash attention (auto)\n"
    "  -ngl  N                   layers on the GPU (all)\n"
    "  -np   N                   sequences side by side with the same text, to test that they don't mix (1)\n"
    "        --kv-unified        one buffer for all sequences\n"
    "  -t,   --threads N\n"
    "  -v                        log everything\n";

struct options {
    std::string model;
    int32_t n_ctx     = 512;
    int32_t n_tokens  = 2048;
    int32_t n_skip    = -1;
    int32_t n_passage = 400;
    int32_t n_filler  = 800;
    int32_t n_scored  = 1; // scored tokens read at a time
    int32_t n_gpu     = -1;
    int32_t n_seq     = 1;
    int32_t n_threads = std::max(1u, std::thread::hardware_concurrency());
    bool    unified   = false;
    bool    verbose   = false;
    std::string type_k = "f16";
    std::string type_v = "f16";
    llama_flash_attn_type flash_attn = LLAMA_FLASH_ATTN_TYPE_AUTO;
    std::vector<std::string> modes = { "full", "window", "atlas", "shuffled" };
    std::vector<std::string> texts;
    std::vector<std::pair<std::string, std::string>> copies;
    llama_atlas_params atlas = llama_atlas_default_params();
};

struct test {
    std::string name;
    std::string kind;
    std::vector<llama_token> tokens;
    int64_t first = 0; // the first token that is scored
};

static ggml_type parse_type(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        if (const char * s = ggml_type_name((ggml_type) i); s && name == s) {
            return (ggml_type) i;
        }
    }
    throw std::invalid_argument("unknown type " + name);
}

static int64_t to_int(const std::string & s, const std::string & name, int64_t min, int64_t max) {
    char * end = nullptr;
    const long long x = strtoll(s.c_str(), &end, 10);
    if (s.empty() || *end != 0 || x < min || x > max) {
        throw std::invalid_argument(name + " takes a number from " + std::to_string(min) + " to " + std::to_string(max) + ", not '" + s + "'");
    }
    return x;
}

static float to_float(const std::string & s, const std::string & name) {
    char * end = nullptr;
    const float x = strtof(s.c_str(), &end);
    if (s.empty() || *end != 0) {
        throw std::invalid_argument(name + " takes a number, not '" + s + "'");
    }
    return x;
}

static options parse(int argc, char ** argv) {
    options o;
    int i = 1;
    const auto value = [&](const std::string & name) -> std::string {
        if (i >= argc) {
            throw std::invalid_argument(name + " takes a value");
        }
        return argv[i++];
    };
    while (i < argc) {
        const std::string a = argv[i++];
        if      (a == "-m"   || a == "--model")        { o.model     = value(a); }
        else if (a == "-c"   || a == "--ctx-size")     { o.n_ctx     = to_int(value(a), a, 16, 1 << 24); }
        else if (a == "-n"   || a == "--tokens")       { o.n_tokens  = to_int(value(a), a, 16, 1 << 24); }
        else if (a == "--skip")                        { o.n_skip    = to_int(value(a), a, 0, 1 << 24); }
        else if (a == "--passage")                     { o.n_passage = to_int(value(a), a, 32, 1 << 24); }
        else if (a == "--filler")                      { o.n_filler  = to_int(value(a), a, 0, 1 << 24); }
        else if (a == "--text")                        { o.texts.push_back(value(a)); }
        else if (a == "--copy")                        { std::string p = value(a); o.copies.emplace_back(p, value(a)); }
        else if (a == "--atlas-cells")                 { o.atlas.n_cells   = to_int(value(a), a, 0, 1 << 24); }
        else if (a == "--atlas-window")                { o.atlas.n_window  = to_int(value(a), a, 1, 1 << 24); }
        else if (a == "--atlas-refresh")               { o.atlas.n_refresh = to_int(value(a), a, 1, 4096); }
        else if (a == "--atlas-chunk")                 { o.atlas.n_chunk   = to_int(value(a), a, 1, 4096); }
        else if (a == "--scored-chunk")                { o.n_scored  = to_int(value(a), a, 1, 4096); }
        else if (a == "--atlas-recall")                { o.atlas.recall    = to_float(value(a), a); }
        else if (a == "--atlas-blend")                 { o.atlas.blend     = to_float(value(a), a); }
        else if (a == "--atlas-archive-max")           { o.atlas.archive_max = to_int(value(a), a, 1, 1 << 30) << 20; }
        else if (a == "--atlas-type-k")                { o.atlas.type_k = parse_type(value(a)); }
        else if (a == "--atlas-type-v")                { o.atlas.type_v = parse_type(value(a)); }
        else if (a == "-ctk" || a == "--cache-type-k") { o.type_k    = value(a); }
        else if (a == "-ctv" || a == "--cache-type-v") { o.type_v    = value(a); }
        else if (a == "-ngl")                          { o.n_gpu     = to_int(value(a), a, 0, 1 << 20); }
        else if (a == "-np")                           { o.n_seq     = to_int(value(a), a, 1, 64); }
        else if (a == "-t"   || a == "--threads")      { o.n_threads = to_int(value(a), a, 1, 512); }
        else if (a == "--kv-unified")                  { o.unified   = true; }
        else if (a == "-v")                            { o.verbose   = true; }
        else if (a == "-fa") {
            const std::string s = value(a);
            if (s != "on" && s != "off" && s != "auto") {
                throw std::invalid_argument("-fa takes on, off or auto");
            }
            o.flash_attn = s == "on" ? LLAMA_FLASH_ATTN_TYPE_ENABLED : s == "off" ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_AUTO;
        } else if (a == "--modes") {
            o.modes.clear();
            std::stringstream ss(value(a));
            for (std::string mode; std::getline(ss, mode, ','); ) {
                if (mode != "full" && mode != "window" && mode != "atlas" && mode != "shuffled") {
                    throw std::invalid_argument("unknown mode " + mode);
                }
                o.modes.push_back(mode);
            }
        } else if (a == "-h" || a == "--help") {
            printf("%s", usage);
            exit(0);
        } else {
            throw std::invalid_argument("unknown option " + a + "; see --help");
        }
    }
    if (o.model.empty() || (o.texts.empty() && o.copies.empty())) {
        throw std::invalid_argument("a model and at least one text are needed; see --help");
    }
    if (o.n_skip < 0) {
        o.n_skip = o.n_ctx*3/2;
    }
    return o;
}

static void emit(const json & j) {
    printf("%s\n", j.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
    fflush(stdout);
}

// FILE[:OFFSET], the offset in bytes
static std::vector<llama_token> read_tokens(const llama_vocab * vocab, const std::string & spec, int32_t n, bool add_special) {
    std::string path = spec;
    int64_t offset = 0;
    const size_t colon = spec.rfind(':');
    if (colon != std::string::npos && colon + 1 < spec.size() && spec.find_first_not_of("0123456789", colon + 1) == std::string::npos) {
        path   = spec.substr(0, colon);
        offset = to_int(spec.substr(colon + 1), "the offset of " + path, 0, INT64_MAX/2);
    }
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error("cannot read " + path);
    }
    std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    text = text.substr(std::min<size_t>(offset, text.size()), (size_t) n*8);

    std::vector<llama_token> res(text.size() + 8);
    const int32_t got = llama_tokenize(vocab, text.data(), text.size(), res.data(), res.size(), add_special, false);
    if (got < n) {
        throw std::runtime_error(spec + " has " + std::to_string(std::max(0, got)) + " tokens, not " + std::to_string(n));
    }
    res.resize(n);
    return res;
}

static double nll_of(const float * logits, int32_t n_vocab, llama_token token) {
    float max = logits[0];
    for (int32_t i = 1; i < n_vocab; ++i) {
        max = std::max(max, logits[i]);
    }
    double sum = 0.0;
    for (int32_t i0 = 0; i0 < n_vocab; i0 += 1024) {
        float part = 0.0f;
        for (int32_t i = i0; i < std::min(n_vocab, i0 + 1024); ++i) {
            part += expf(logits[i] - max);
        }
        sum += part;
    }
    return max + log(sum) - logits[token];
}

struct context_deleter {
    void operator()(llama_context * ctx) const { llama_free(ctx); }
};
using context_ptr = std::unique_ptr<llama_context, context_deleter>;

static context_ptr make_context(llama_model * model, const options & o, const llama_atlas_params * atlas, int32_t n_ctx, int32_t n_batch) {
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx           = n_ctx*o.n_seq;
    cp.n_batch         = n_batch*o.n_seq;
    cp.n_ubatch        = n_batch*o.n_seq;
    cp.n_seq_max       = o.n_seq;
    cp.kv_unified      = o.unified;
    cp.n_threads       = o.n_threads;
    cp.n_threads_batch = o.n_threads;
    cp.type_k          = parse_type(o.type_k);
    cp.type_v          = parse_type(o.type_v);
    cp.flash_attn_type = o.flash_attn;
    cp.atlas           = atlas;

    context_ptr ctx(llama_init_from_model(model, cp));
    if (!ctx) {
        throw std::runtime_error("cannot make a context of " + std::to_string(n_ctx) + " cells; -v tells more");
    }
    return ctx;
}

// the NLL of each token but the first, given those before it
static std::vector<double> run(llama_context * ctx, const options & o, const test & t, const std::string & mode, int32_t n_batch) {
    const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
    const int32_t n_vocab = llama_vocab_n_tokens(vocab);
    const int32_t n = t.tokens.size();

    llama_memory_clear(llama_get_memory(ctx), true);

    struct batch_guard {
        llama_batch b;
        ~batch_guard() { llama_batch_free(b); }
    } guard { llama_batch_init(n_batch*o.n_seq, 0, 1) };
    llama_batch & batch = guard.b;

    std::vector<double> res;
    int32_t shown = 0;

    for (int32_t i = 0; i < n; ) {
        int32_t m = std::min(n - i, n_batch);
        if (mode != "full") {
            // nll[i] is of token i + 1, so t.first is the first token to be read alone
            m = i < t.first ? std::min<int32_t>(m, t.first - i) : std::min(m, o.n_scored);
        }
        for (int32_t s = 0; s < o.n_seq; ++s) {
            m = std::min(m, llama_atlas_prepare(ctx, s, m));
        }
        if (m <= 0) {
            throw std::runtime_error("the sequence cannot grow beyond " + std::to_string(i) + " tokens; -v tells more");
        }

        batch.n_tokens = 0;
        for (int32_t s = 0; s < o.n_seq; ++s) {
            for (int32_t j = 0; j < m; ++j) {
                const int32_t k = batch.n_tokens++;
                // the other sequences read other texts: the same, from another token on
                batch.token[k]     = t.tokens[(i + j + s*(n/o.n_seq)) % n];
                batch.pos[k]       = i + j;
                batch.n_seq_id[k]  = 1;
                batch.seq_id[k][0] = s;
                batch.logits[k]    = s == 0;
            }
        }
        if (const int ret = llama_decode(ctx, batch); ret != 0) {
            throw std::runtime_error("llama_decode failed with " + std::to_string(ret) + " after " + std::to_string(i) + " tokens");
        }
        for (int32_t j = 0; j < m && i + j + 1 < n; ++j) {
            res.push_back(nll_of(llama_get_logits_ith(ctx, j), n_vocab, t.tokens[i + j + 1]));
        }
        i += m;

        if (i - shown >= 256 || i == n) {
            shown = i;
            emit({{"event", "progress"}, {"test", t.name}, {"mode", mode}, {"done", i}, {"total", n}});
        }
    }
    return res;
}

static double mean(const std::vector<double> & x, int64_t i0, int64_t i1) {
    i0 = std::max<int64_t>(0, std::min<int64_t>(i0, x.size()));
    i1 = std::min<int64_t>(i1, x.size());
    double sum = 0.0;
    for (int64_t i = i0; i < i1; ++i) {
        sum += x[i];
    }
    return i1 > i0 ? sum/(i1 - i0) : 0.0;
}

static void evaluate(llama_model * model, const options & o) {
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const bool add_bos = llama_vocab_get_add_bos(vocab);

    std::vector<test> tests;
    for (const auto & spec : o.texts) {
        tests.push_back({ spec, "text", read_tokens(vocab, spec, o.n_tokens, add_bos), o.n_skip });
        if (o.n_skip + 1 >= o.n_tokens) {
            throw std::invalid_argument("nothing is left of " + spec + " behind the " + std::to_string(o.n_skip) + " tokens to skip");
        }
    }
    for (const auto & [passage, filler] : o.copies) {
        test t { passage, "copy", {}, 0 };
        const auto p = read_tokens(vocab, passage, o.n_passage, false);
        const auto f = read_tokens(vocab, filler, o.n_filler, false);
        if (add_bos) {
            t.tokens.push_back(llama_vocab_bos(vocab));
        }
        t.tokens.insert(t.tokens.end(), p.begin(), p.end());
        t.tokens.insert(t.tokens.end(), f.begin(), f.end());
        t.tokens.insert(t.tokens.end(), p.begin(), p.end());
        t.first = t.tokens.size() - p.size() + 20 - 1;
        tests.push_back(std::move(t));
    }

    // the modes other than full share all but the number of cells
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx      = o.n_ctx*o.n_seq;
    cp.n_seq_max  = o.n_seq;
    cp.kv_unified = o.unified;

    llama_atlas_params atlas = o.atlas;
    std::string reasons(2048, 0);
    const bool uses_atlas = std::any_of(o.modes.begin(), o.modes.end(), [](const auto & m) { return m != "full"; });
    if (uses_atlas) {
        if (const char * reason = llama_atlas_unsupported(model, cp)) {
            throw std::runtime_error(std::string("this model cannot have a memory: ") + reason);
        }
        const bool ok = llama_atlas_configure(model, cp, &atlas, reasons.data(), reasons.size());
        reasons.resize(strlen(reasons.c_str()));
        if (!ok) {
            throw std::invalid_argument(reasons);
        }
    }

    char desc[128] = {};
    llama_model_meta_val_str(model, "general.architecture", desc, sizeof(desc));
    emit({{"event", "config"}, {"model", o.model}, {"arch", desc}, {"n_ctx", o.n_ctx}, {"n_cells", atlas.n_cells},
          {"n_window", atlas.n_window}, {"n_sink", 4}, {"n_refresh", atlas.n_refresh}, {"n_chunk", atlas.n_chunk}, {"recall", atlas.recall},
          {"blend", atlas.blend}, {"type_k", o.type_k}, {"type_v", o.type_v}, {"reasons", uses_atlas ? reasons.c_str() : ""}});

    for (const auto & mode : o.modes) {
        context_ptr ctx;
        llama_atlas_params p = atlas;
        if (mode == "window") {
            p.n_window += p.n_cells;
            p.n_cells = 0;
        }
        p.shuffle = mode == "shuffled";

        for (const auto & t : tests) {
            const int32_t n_batch = mode == "full" ? 256 : std::max(atlas.n_chunk, o.n_scored);
            if (!ctx || mode == "full") {
                ctx.reset();
                ctx = make_context(model, o, mode == "full" ? nullptr : &p, mode == "full" ? (int32_t) t.tokens.size() : o.n_ctx, n_batch);
            }

            const auto t0 = std::chrono::steady_clock::now();
            const std::vector<double> nll = run(ctx.get(), o, t, mode, n_batch);
            const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();

            json by_position = json::array();
            for (size_t i = 0; i < nll.size(); i += 64) {
                by_position.push_back({ i, mean(nll, i, i + 64) });
            }
            json res = {{"event", "result"}, {"test", t.name}, {"kind", t.kind}, {"mode", mode},
                        {"n_tokens", t.tokens.size()}, {"n_scored", nll.size() - t.first},
                        {"nll", mean(nll, t.first, nll.size())},
                        {"tail_nll", mean(nll, std::max<int64_t>(t.first, nll.size() - 2048), nll.size())},
                        {"seconds", seconds}, {"by_position", by_position}};
            if (mode != "full") {
                const llama_atlas_stats st = llama_atlas_get_stats(ctx.get(), 0);
                res["stats"] = {{"n_refresh", st.n_refresh}, {"n_archived", st.n_archived}, {"n_forgotten", st.n_forgotten},
                                {"n_recalled", st.n_recalled}, {"bytes", st.bytes}, {"t_score_ms", st.t_score/1e3},
                                {"t_write_ms", st.t_write/1e3}, {"t_slide_ms", st.t_slide/1e3}};
            }
            emit(res);
        }
    }
}

int main(int argc, char ** argv) {
    llama_model * model = nullptr;
    int ret = 0;
    try {
        const options o = parse(argc, argv);

        static bool verbose = o.verbose;
        llama_log_set([](ggml_log_level level, const char * text, void *) {
            if (verbose || level >= GGML_LOG_LEVEL_ERROR) {
                fputs(text, stderr);
            }
        }, nullptr);
        llama_backend_init();

        llama_model_params mp = llama_model_default_params();
        mp.n_gpu_layers = o.n_gpu < 0 ? 999 : o.n_gpu;
        model = llama_model_load_from_file(o.model.c_str(), mp);
        if (!model) {
            throw std::runtime_error("cannot load " + o.model + "; -v tells more");
        }
        evaluate(model, o);
    } catch (const std::exception & e) {
        emit({{"event", "error"}, {"message", e.what()}});
        ret = 1;
    }
    llama_model_free(model);
    llama_backend_free();
    return ret;
}
