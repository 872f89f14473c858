// Decodes parts of JPEG images, by a libjpeg-turbo that is in the process already.
//
// Its functions are looked up by name, since no wheel has its headers. The library itself checks that the structure
// that both sides share has the layout that it expects.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace knltrain {

// Looks up the functions in a shared library. Returns why it cannot be used, or an empty string.
std::string use_libjpeg(const std::string &path);

// One JPEG file in memory, which must outlive this.
class Jpeg {
  public:
    // Throws std::invalid_argument: not a JPEG, or a damaged header.
    Jpeg(const uint8_t *data, size_t size);
    ~Jpeg();
    Jpeg(const Jpeg &) = delete;
    Jpeg &operator=(const Jpeg &) = delete;

    int64_t height() const;
    int64_t width() const;
    // Whether the file's colours are converted to RGB: CMYK is not.
    bool becomes_rgb() const;

    struct Window {
        int64_t top, left, height, width;
    };
    // Prepares to decode a window that contains `asked`, in pixels of the image at 1, 1/2, 1/4 or 1/8 of its size, and
    // returns the window: as high as asked, and somewhat wider. Throws as the constructor does, and std::out_of_range
    // where `asked` is not inside the image.
    Window begin(const Window &asked, int denominator);
    // Decodes it: height x width x 3. Throws if the file is damaged in or before that part.
    void read(uint8_t *pixels);

  private:
    struct State;
    std::unique_ptr<State> state;
};

}  // namespace knltrain
