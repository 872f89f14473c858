#include "jpeg.h"

#include <dlfcn.h>
#include <setjmp.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace knltrain {
namespace {

// The first members of libjpeg's public structures, as in versions 6b to 8 on 64-bit Linux.
struct Source {
    const uint8_t *next;
    size_t left;
};

struct Decompressor {
    void *errors;
    char before_source[32];
    Source *source;
    uint32_t image_width, image_height;
    int32_t channels, colours, wanted_colours;
    uint32_t scale_numerator, scale_denominator;
    char before_output[60];
    uint32_t output_width, output_height;
    char rest[1024];
};
static_assert(offsetof(Decompressor, source) == 40, "");
static_assert(offsetof(Decompressor, image_width) == 48, "");
static_assert(offsetof(Decompressor, scale_denominator) == 72, "");
static_assert(offsetof(Decompressor, output_width) == 136, "");

struct Errors {
    void (*fatal)(Decompressor *);             // must not return
    void (*message)(Decompressor *, int);      // a level below 0: the data are damaged, but decoding goes on
    void (*print)(Decompressor *);
    char rest[512];
    // libjpeg does not know of the following.
    jmp_buf escape;
    bool damaged;
};

enum Colours { kGrey = 1, kRgb = 2, kYCbCr = 3 };

struct Library {
    int version = 0;
    size_t structure = 0;
    void *(*std_error)(Errors *);
    void (*create)(Decompressor *, int version, size_t structure);
    void (*memory_source)(Decompressor *, const unsigned char *, unsigned long);
    int (*read_header)(Decompressor *, int require_image);
    int (*start)(Decompressor *);
    void (*crop_columns)(Decompressor *, uint32_t *left, uint32_t *width);
    uint32_t (*skip_rows)(Decompressor *, uint32_t);
    uint32_t (*read_rows)(Decompressor *, uint8_t **, uint32_t);
    void (*abort)(Decompressor *);
    void (*destroy)(Decompressor *);
};

Library library;

// (version, size of the structure): libjpeg.so.62 and libjpeg.so.8.
constexpr std::pair<int, size_t> kInterfaces[] = {{62, 632}, {80, 656}};

void escape(Decompressor *from) { longjmp(static_cast<Errors *>(from->errors)->escape, 1); }
void record_damage(Decompressor *from, int level) {
    if (level < 0) static_cast<Errors *>(from->errors)->damaged = true;
}
void print_nothing(Decompressor *) {}

void prepare(const Library &with, Decompressor &decompressor, Errors &errors) {
    decompressor.errors = with.std_error(&errors);
    errors.fatal = escape, errors.message = record_damage, errors.print = print_nothing;
}

template <class F> bool find(void *handle, const char *name, F *&function) {
    function = reinterpret_cast<F *>(dlsym(handle, name));
    return function != nullptr;
}

// Whether the library accepts a decompressor of this version and size.
bool accepts(const Library &candidate, int version, size_t structure) {
    Decompressor decompressor{};
    Errors errors{};
    prepare(candidate, decompressor, errors);
    if (setjmp(errors.escape) != 0) return false;
    candidate.create(&decompressor, version, structure);
    candidate.destroy(&decompressor);
    return true;
}

}  // namespace

std::string use_libjpeg(const std::string &path) {
    void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return dlerror();
    Library found;
    if (!find(handle, "jpeg_std_error", found.std_error) || !find(handle, "jpeg_CreateDecompress", found.create) ||
        !find(handle, "jpeg_mem_src", found.memory_source) || !find(handle, "jpeg_read_header", found.read_header) ||
        !find(handle, "jpeg_start_decompress", found.start) ||
        !find(handle, "jpeg_crop_scanline", found.crop_columns) ||
        !find(handle, "jpeg_skip_scanlines", found.skip_rows) ||
        !find(handle, "jpeg_read_scanlines", found.read_rows) || !find(handle, "jpeg_abort_decompress", found.abort) ||
        !find(handle, "jpeg_destroy_decompress", found.destroy))
        return path + " is no libjpeg-turbo that decodes parts of images";
    for (const auto &[version, structure] : kInterfaces)
        if (accepts(found, version, structure)) {
            found.version = version, found.structure = structure;
            library = found;
            return "";
        }
    return path + " has another interface than libjpeg.so.62 and libjpeg.so.8";
}

struct Jpeg::State {
    Decompressor decompressor{};
    Errors errors{};
    const uint8_t *data;
    size_t size;
    bool begun = false;
    Window window{};
};

Jpeg::Jpeg(const uint8_t *data, size_t size) : state(new State) {
    if (library.version == 0) throw std::logic_error("no libjpeg is in use");
    State &s = *state;
    s.data = data, s.size = size;
    prepare(library, s.decompressor, s.errors);
    if (setjmp(s.errors.escape) != 0) {
        library.destroy(&s.decompressor);
        throw std::invalid_argument("a JPEG with a damaged header");
    }
    library.create(&s.decompressor, library.version, library.structure);
    library.memory_source(&s.decompressor, data, size);
    library.read_header(&s.decompressor, 1);
}

Jpeg::~Jpeg() { library.destroy(&state->decompressor); }

int64_t Jpeg::height() const { return state->decompressor.image_height; }
int64_t Jpeg::width() const { return state->decompressor.image_width; }
bool Jpeg::becomes_rgb() const {
    const int colours = state->decompressor.colours;
    return colours == kGrey || colours == kRgb || colours == kYCbCr;
}

Jpeg::Window Jpeg::begin(const Window &asked, int denominator) {
    State &s = *state;
    if (setjmp(s.errors.escape) != 0) {
        library.abort(&s.decompressor);
        throw std::invalid_argument("a damaged JPEG");
    }
    if (s.begun) {
        library.abort(&s.decompressor);
        library.memory_source(&s.decompressor, s.data, s.size);
        library.read_header(&s.decompressor, 1);
    }
    s.begun = true;
    s.decompressor.wanted_colours = kRgb;
    s.decompressor.scale_numerator = 1, s.decompressor.scale_denominator = uint32_t(denominator);
    library.start(&s.decompressor);
    const int64_t width = s.decompressor.output_width, height = s.decompressor.output_height;
    s.window = {asked.top, 0, asked.height, width};
    if (asked.top < 0 || asked.left < 0 || asked.height < 1 || asked.width < 1 || asked.top + asked.height > height ||
        asked.left + asked.width > width)
        throw std::out_of_range("a window outside of the image");
    // libjpeg computes the outermost columns of a window without their neighbours' colours, unlike those of a whole
    // image. So two more are decoded on either side, and not used.
    const int64_t left = std::max<int64_t>(0, asked.left - 2);
    const int64_t right = std::min(width, asked.left + asked.width + 2);
    if (left > 0 || right < width) {
        uint32_t first = uint32_t(left), columns = uint32_t(right - left);
        library.crop_columns(&s.decompressor, &first, &columns);
        s.window.left = first, s.window.width = columns;
    }
    return s.window;
}

void Jpeg::read(uint8_t *pixels) {
    State &s = *state;
    if (setjmp(s.errors.escape) != 0) {
        library.abort(&s.decompressor);
        throw std::invalid_argument("a damaged JPEG");
    }
    if (s.window.top > 0) library.skip_rows(&s.decompressor, uint32_t(s.window.top));
    for (int64_t row = 0; row < s.window.height;) {
        uint8_t *at = pixels + row * s.window.width * 3;
        if (library.read_rows(&s.decompressor, &at, 1) == 0) throw std::logic_error("the window was read before");
        ++row;
    }
    if (s.errors.damaged) throw std::invalid_argument("a damaged JPEG");
}

}  // namespace knltrain
