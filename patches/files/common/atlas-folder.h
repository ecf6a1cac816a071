#pragma once

#include "atlas.h"
#include "atlas-file.h"

#include <cstdint>
#include <string>
#include <vector>

// held while a file is written or read; other processes wait for nobody, they are refused
struct atlas_lock {
    atlas_lock(const std::string & path, bool exclusive); // throws common_atlas_error
    atlas_lock(const atlas_lock &) = delete;
    ~atlas_lock() { release(); }

    void release();

private:
    int fd = -1;
};

// The folder of the memory files of one model: names, backups, limits. A name may have an owner, whose files are in a folder
// of that name: "owner/name".
class common_atlas_folder {
public:
    // deletes what a process left that was killed while it saved
    common_atlas_folder(std::string dir, std::string model_hash, int32_t n_backup, common_atlas_limits limits);

    // [A-Za-z0-9._-]{1,128}, not starting with a dot; a trailing .atlas does not count
    static bool name_ok (const std::string & name);
    static bool owner_ok(const std::string & owner); // [a-z0-9]{1,32}
    static std::string session_name(const std::string & name);

    bool exists(const std::string & name) const; // the file or a backup

    // these throw common_atlas_error and return what the file says about itself
    common_json info(const std::string & name) const;
    common_json list(const std::string & owner) const;

    // the number of files that were deleted
    int32_t remove(const std::string & name) const;

protected:
    std::string dir;
    std::string model_hash;
    int32_t     n_backup;
    common_atlas_limits limits;

    std::string path(const std::string & name) const;
    std::string lock_path(const std::string & name) const;
    std::vector<std::string> backups(const std::string & name) const; // newest first

    void replace(const std::string & name, const std::string & temp, int64_t time) const;
    void trim   (const std::string & name) const;
    void prune  (const std::string & name, const std::vector<std::string> & keep) const;

private:
    void sweep(const std::string & folder) const;
    common_json describe(const std::string & path) const;
};
