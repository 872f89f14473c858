// Parts of JPEG images, decoded by a libjpeg-turbo that is in the process already.
//
// The library is reached through its published interface by the names of its functions: no wheel brings its headers.
// It checks itself whether the structure that both sides share has the layout that it expects.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace knltrain {

// Looks in a shared library for what is needed here. Returns why it cannot serve, or nothing.
std::string use_libjpeg(const std::string &path);

// One JPEG file in memory, which outlives this.
class Jpeg {
  public:
    // Throws std::invalid_argument: no JPEG, or one whose header is damaged.
    Jpeg(const uint8_t *data, size_t size);
    ~Jpeg();
    Jpeg(const Jpeg &) = delete;
    Jpeg &operator=(const Jpeg &) = delete;

    int64_t height() const;
    int64_t width() const;
    // How many bytes come before the pixels' first.
    size_t header() const;
    // Whether the file's colours become RGB here: those of printing do not.
    bool becomes_rgb() const;

    struct Window {
        int64_t top, left, height, width;
    };
    // Prepares to decode a window that holds `asked` of the image at 1, 1/2, 1/4 or 1/8 of its size, and says which:
    // as high as asked, and somewhat wider. Throws as the constructor, and where `asked` is not inside the image.
    Window begin(const Window &asked, int denominator);
    // Decodes it: height x width x 3. Throws if the file is damaged in or before that part.
    void read(uint8_t *pixels);

  private:
    struct State;
    std::unique_ptr<State> state;
};

}  // namespace knltrain
