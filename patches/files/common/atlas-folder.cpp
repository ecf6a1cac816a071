#include "atlas-folder.h"

#include "log.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <set>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#endif

namespace fs = std::filesystem;

using json = common_json;

atlas_lock::atlas_lock(const std::string & path, bool exclusive) {
#ifndef _WIN32
    fd = open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 && exclusive) {
        throw atlas_io_error("cannot create", path);
    }
    if (fd >= 0 && flock(fd, (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) != 0) {
        close(fd);
        throw common_atlas_error(409, "the memory file is in use by another process");
    }
#else
    (void) path; (void) exclusive;
#endif
}

void atlas_lock::release() {
#ifndef _WIN32
    if (fd >= 0) {
        close(fd);
    }
#endif
    fd = -1;
}

static void sync_folder(const std::string & path) {
#ifndef _WIN32
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
#else
    (void) path;
#endif
}

common_atlas_folder::common_atlas_folder(std::string dir, std::string model_hash, int32_t n_backup, common_atlas_limits limits)
    : dir(std::move(dir)), model_hash(std::move(model_hash)), n_backup(n_backup), limits(limits) {
    sweep(this->dir);
    std::error_code ec;
    for (const auto & entry : fs::directory_iterator(this->dir, ec)) {
        if (entry.is_directory(ec) && owner_ok(entry.path().filename().string())) {
            sweep(entry.path().string());
        }
    }
}

std::string common_atlas_folder::session_name(const std::string & name) {
    const std::string suffix = ".atlas";
    const bool has = name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
    return has ? name.substr(0, name.size() - suffix.size()) : name;
}

bool common_atlas_folder::name_ok(const std::string & name) {
    return !name.empty() && name.size() <= 128 && name[0] != '.' && std::all_of(name.begin(), name.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
    });
}

bool common_atlas_folder::owner_ok(const std::string & owner) {
    return !owner.empty() && owner.size() <= 32 && std::all_of(owner.begin(), owner.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
    });
}

std::string common_atlas_folder::path(const std::string & name) const {
    const size_t slash = name.find('/');
    const std::string file = slash == std::string::npos ? name : name.substr(slash + 1);
    if (!name_ok(file) || (slash != std::string::npos && !owner_ok(name.substr(0, slash)))) {
        throw common_atlas_error(400, "the name of a memory file is made of 1 to 128 letters, digits, '.', '_' and '-', and does not start with '.'");
    }
    return (fs::path(dir) / (session_name(name) + ".atlas")).string();
}

std::string common_atlas_folder::lock_path(const std::string & name) const {
    const fs::path p = path(name);
    return (p.parent_path() / ("." + p.stem().string() + ".lock")).string();
}

std::vector<std::string> common_atlas_folder::backups(const std::string & name) const {
    const fs::path p = path(name);
    const std::string prefix = p.stem().string() + "_";
    const std::string suffix = ".atlas.bak";
    std::vector<std::pair<uint64_t, std::string>> found;
    std::error_code ec;
    for (const auto & entry : fs::directory_iterator(p.parent_path(), ec)) {
        const std::string file = entry.path().filename().string();
        if (file.size() <= prefix.size() + suffix.size() || file.compare(0, prefix.size(), prefix) != 0 ||
                file.compare(file.size() - suffix.size(), suffix.size(), suffix) != 0) {
            continue;
        }
        const std::string time = file.substr(prefix.size(), file.size() - prefix.size() - suffix.size());
        if (time.size() < 16 && time.find_first_not_of("0123456789") == std::string::npos) {
            found.emplace_back(std::stoull(time), entry.path().string());
        }
    }
    std::sort(found.rbegin(), found.rend());
    std::vector<std::string> res;
    for (auto & [time, path] : found) {
        res.push_back(std::move(path));
    }
    return res;
}

bool common_atlas_folder::exists(const std::string & name) const {
    std::error_code ec;
    const bool there = fs::exists(path(name), ec);
    return there || ec || !backups(name).empty(); // what is wrong with it shows when it is loaded
}

// delete what a process left that was killed while it saved
void common_atlas_folder::sweep(const std::string & folder) const {
    const std::string suffix = ".atlas.tmp";
    std::error_code ec;
    for (const auto & entry : fs::directory_iterator(folder, ec)) {
        const std::string file = entry.path().filename().string();
        if (file.size() <= suffix.size() || file.compare(file.size() - suffix.size(), suffix.size(), suffix) != 0) {
            continue;
        }
        try {
            const std::string name = file.substr(0, file.size() - suffix.size());
            atlas_lock lock((fs::path(folder) / ("." + name + ".lock")).string(), true);
            LOG_WRN("ATLAS: deleting %s, which was never completed\n", entry.path().string().c_str());
            fs::remove(entry.path(), ec);
        } catch (const common_atlas_error &) {
            // somebody is writing it
        }
    }
}

// keep the folder within its limits
void common_atlas_folder::prune(const std::string & name, const std::vector<std::string> & keep) const {
    struct item {
        fs::file_time_type used;
        std::string name;
        int64_t bytes;
    };
    const size_t slash = name.find('/');
    const std::string owner = slash == std::string::npos ? "" : name.substr(0, slash + 1);

    std::vector<item> items;
    int64_t bytes = 0;
    std::error_code ec;
    for (const auto & entry : fs::directory_iterator(fs::path(path(name)).parent_path(), ec)) {
        if (entry.path().extension() != ".atlas" || !name_ok(entry.path().filename().string())) {
            continue;
        }
        item x = { entry.last_write_time(ec), owner + entry.path().stem().string(), (int64_t) entry.file_size(ec) };
        for (const auto & backup : backups(x.name)) {
            x.bytes += fs::file_size(backup, ec);
        }
        bytes += x.bytes;
        items.push_back(std::move(x));
    }
    std::sort(items.begin(), items.end(), [](const item & a, const item & b) { return a.used < b.used; });

    int64_t n = items.size();
    const auto now = fs::file_time_type::clock::now();
    for (const auto & x : items) {
        const bool too_old = limits.age > 0 && now - x.used > std::chrono::seconds(limits.age);
        if (!too_old && (limits.n_files == 0 || n <= limits.n_files) && (limits.bytes == 0 || bytes <= limits.bytes)) {
            break;
        }
        if (x.name == session_name(name) || std::find(keep.begin(), keep.end(), x.name) != keep.end()) {
            continue;
        }
        try {
            remove(x.name);
            LOG_WRN("ATLAS: deleted %s, which was not used for the longest time: there are too many, too large or too old files\n", x.name.c_str());
            n--;
            bytes -= x.bytes;
        } catch (const common_atlas_error & e) {
            LOG_WRN("ATLAS: cannot delete %s: %s\n", x.name.c_str(), e.what());
        }
    }
}

// a new file takes the place of the old one, which becomes a backup
void common_atlas_folder::replace(const std::string & name, const std::string & temp, int64_t time) const {
    const std::string target = path(name);
    std::error_code ec;
    if (n_backup > 0 && fs::exists(target)) {
        std::string backup;
        do {
            backup = target.substr(0, target.size() - 6) + "_" + std::to_string(time++) + ".atlas.bak";
        } while (fs::exists(backup));
        fs::create_hard_link(target, backup, ec);
        if (ec) {
            fs::copy_file(target, backup);
        }
    }
    fs::rename(temp, target);
    sync_folder(fs::path(target).parent_path().string());
}

// not more backups than are kept
void common_atlas_folder::trim(const std::string & name) const {
    const auto all = backups(name);
    for (size_t i = n_backup; i < all.size(); ++i) {
        std::error_code ec;
        fs::remove(all[i], ec);
    }
}

json common_atlas_folder::describe(const std::string & path) const {
    json res = {{"file", fs::path(path).filename().string()}};
    try {
        const atlas_reader r(path);
        const json & about = r.header().at("session");
        const std::string hash = r.header().at("model").at("hash").get<std::string>();
        res["name"]       = about.at("name").get<std::string>();
        res["n_tokens"]   = about.at("n_tokens").get<int64_t>();
        res["n_archived"] = about.at("n_archived").get<int64_t>();
        res["created"]    = about.at("created").get<int64_t>();
        res["saved"]      = about.at("saved").get<int64_t>();
        res["model"]      = r.header().at("model").value("description", "unknown");
        res["cells"]      = r.header().at("params").at("cells").get<int64_t>();
        res["window"]     = r.header().at("params").at("window").get<int64_t>();
        res["bytes"]      = r.size;
        res["raw"]        = r.header().at("raw").get<int64_t>();
        res["frames"]     = r.n_frames();
        res["compatible"] = hash == model_hash;
        if (hash != model_hash) {
            res["reason"] = "it belongs to another model";
        }
    } catch (const common_json_error & e) {
        res["compatible"] = false;
        res["reason"]     = std::string("corruption: the header cannot be understood: ") + e.what();
    } catch (const common_atlas_error & e) {
        if (e.status != 400) {
            throw;
        }
        res["compatible"] = false;
        res["reason"]     = e.what();
    }
    return res;
}

json common_atlas_folder::info(const std::string & name) const {
    json res = describe(path(name));
    res["backups"] = json::array();
    for (const auto & backup : backups(name)) {
        res["backups"].push_back(fs::path(backup).filename().string());
    }
    return res;
}

json common_atlas_folder::list(const std::string & owner) const {
    std::set<std::string> files;
    std::error_code ec;
    for (const auto & entry : fs::directory_iterator(fs::path(dir) / owner, ec)) {
        const std::string file = entry.path().filename().string();
        if (entry.path().extension() == ".atlas" && name_ok(file)) {
            files.insert(entry.path().string());
        }
    }
    if (ec && ec != std::errc::no_such_file_or_directory) {
        throw common_atlas_error(500, "cannot read the folder of the memory files: " + ec.message());
    }
    json res = json::array();
    for (const auto & file : files) {
        try {
            res.push_back(describe(file));
        } catch (const common_atlas_error & e) {
            res.push_back({{"file", fs::path(file).filename().string()}, {"compatible", false}, {"reason", e.what()}});
        }
    }
    return res;
}

int32_t common_atlas_folder::remove(const std::string & name) const {
    std::vector<std::string> files = backups(name);
    files.push_back(path(name));
    std::error_code ec;
    if (!fs::exists(path(name), ec) && !ec && files.size() == 1) {
        throw common_atlas_error(404, "there is no memory file " + fs::path(path(name)).filename().string());
    }
    atlas_lock lock(lock_path(name), true);
    int32_t n = 0;
    for (const auto & file : files) {
        n += fs::remove(file, ec);
        if (ec) {
            throw common_atlas_error(500, "cannot delete " + fs::path(file).filename().string() + ": " + ec.message());
        }
    }
    fs::remove(lock_path(name), ec);
    return n;
}
